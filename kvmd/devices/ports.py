"""The machine's I/O ports: which device answers which, and what happens where none does."""

from __future__ import annotations

import threading
from typing import Protocol

PORTS = 1 << 16
"""Ports that x86 has."""

UNCLAIMED_KEPT = 16
"""Distinct unclaimed ports that are remembered for the log."""


class PortDevice(Protocol):
    """A device of byte-wide registers. Called from any vCPU thread: it locks for itself."""

    def read(self, offset: int) -> int:
        """Return the byte, 0 to 255, of the register at ``offset``."""

    def write(self, offset: int, value: int) -> None:
        """Write the byte ``value`` to the register at ``offset``."""


class PortBus:
    """Dispatches port accesses, from any vCPU thread.

    Devices are added before the first vCPU runs; from then on the table does not change, so that looking
    something up needs no lock. The only lock guards the counters of unclaimed ports, and is innermost.
    """

    def __init__(self) -> None:
        self._claims: dict[int, tuple[PortDevice, int]] = {}
        self._lock = threading.Lock()
        self._unclaimed = 0
        self._unclaimed_ports: list[int] = []

    def add(self, first: int, count: int, device: PortDevice) -> None:
        """Give ports ``first`` to ``first + count - 1`` to ``device``.

        Raises:
            ValueError: the range is empty, leaves the 65536 ports, or overlaps another device's.
        """
        ports = range(first, first + count)
        if count < 1 or first < 0 or ports.stop > PORTS:
            raise ValueError(f"ports [{first:#x}, {ports.stop:#x}) are not a range within [0, {PORTS:#x})")
        taken = self._claims.keys() & set(ports)
        if taken:
            raise ValueError(f"port {min(taken):#x} belongs to another device")
        for offset, port in enumerate(ports):
            self._claims[port] = (device, offset)

    @property
    def unclaimed(self) -> int:
        """Accesses so far with at least one byte that no device answered."""
        return self._unclaimed

    @property
    def unclaimed_ports(self) -> tuple[int, ...]:
        """The first distinct ports that no device answered, at most ``UNCLAIMED_KEPT``."""
        with self._lock:
            return tuple(self._unclaimed_ports)

    def read(self, port: int, size: int) -> bytes:
        """Return the ``size`` bytes that an IN reads: all ones where no device answers.

        A wide access is one to each of the consecutive ports, lowest first, as on an 8-bit bus.
        """
        data = bytearray()
        missing: int | None = None
        for at in range(port, port + size):
            claim = self._claims.get(at)
            if claim is None:
                missing = at if missing is None else missing
                data.append(0xFF)
            else:
                device, offset = claim
                data.append(device.read(offset))
        if missing is not None:
            self._count_unclaimed(missing)
        return bytes(data)

    def write(self, port: int, data: bytes) -> None:
        """Write the bytes of an OUT, each to its port, lowest first; ignored where no device answers."""
        missing: int | None = None
        for at, value in enumerate(data, port):
            claim = self._claims.get(at)
            if claim is None:
                missing = at if missing is None else missing
            else:
                device, offset = claim
                device.write(offset, value)
        if missing is not None:
            self._count_unclaimed(missing)

    def _count_unclaimed(self, port: int) -> None:
        with self._lock:
            self._unclaimed += 1
            if len(self._unclaimed_ports) < UNCLAIMED_KEPT and port not in self._unclaimed_ports:
                self._unclaimed_ports.append(port)
