"""Memory-mapped I/O: which device answers where, and what happens where none does."""

from __future__ import annotations

import threading
from bisect import bisect_right
from typing import Protocol

from kvmd.ranges import GpaRange

ADDRESSES_KEPT = 16
"""Distinct addresses that are remembered for the log."""


class MmioDevice(Protocol):
    """A device with registers in guest-physical addresses. Called from any vCPU thread: it locks for itself."""

    def read(self, offset: int, size_bytes: int) -> bytes:
        """Return the ``size_bytes`` (1 to 8) at ``offset``."""

    def write(self, offset: int, data: bytes) -> None:
        """Write ``data`` (1 to 8 bytes) at ``offset``."""


class MmioCounter:
    """Counts accesses outside memory, from any vCPU thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._unclaimed = 0
        self._addresses: list[int] = []

    @property
    def unclaimed(self) -> int:
        """Accesses so far that nothing answered."""
        return self._unclaimed

    @property
    def unclaimed_addresses(self) -> tuple[int, ...]:
        """The first distinct gpas of them, at most ``ADDRESSES_KEPT``."""
        with self._lock:
            return tuple(self._addresses)

    def count(self, gpa: int) -> None:
        """Count one access to ``gpa``."""
        with self._lock:
            self._unclaimed += 1
            if len(self._addresses) < ADDRESSES_KEPT and gpa not in self._addresses:
                self._addresses.append(gpa)


class MmioBus:
    """Finds the device that an access is for, from any vCPU thread.

    Devices are added before the first vCPU runs; from then on the table does not change, so that looking something up
    needs no lock.
    """

    def __init__(self) -> None:
        self._windows: list[tuple[int, int, MmioDevice]] = []
        self._starts: list[int] = []

    def add(self, window: GpaRange, device: MmioDevice) -> None:
        """Give the addresses of ``window`` to ``device``.

        Raises:
            ValueError: some of them belong to another device.
        """
        at = bisect_right(self._starts, window.start)
        if (at and self._windows[at - 1][1] > window.start) or (
            at < len(self._starts) and window.end > self._starts[at]
        ):
            raise ValueError(f"addresses in {window} belong to another device")
        self._starts.insert(at, window.start)
        self._windows.insert(at, (window.start, window.end, device))

    def find(self, gpa: int, size_bytes: int) -> tuple[MmioDevice, int] | None:
        """Return the device whose window holds all of the access, and the access's offset in it; None for none."""
        at = bisect_right(self._starts, gpa) - 1
        if at < 0:
            return None
        start, end, device = self._windows[at]
        return (device, gpa - start) if gpa + size_bytes <= end else None
