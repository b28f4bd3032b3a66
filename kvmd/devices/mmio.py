"""Memory-mapped I/O where nothing answers: all ones, ignored, and counted."""

from __future__ import annotations

import threading

ADDRESSES_KEPT = 16
"""Distinct addresses that are remembered for the log."""


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
