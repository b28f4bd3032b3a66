"""What the operator types, on its way from the event loop to the vCPU threads that read the serial port."""

from __future__ import annotations

import threading
from collections.abc import Callable

DEFAULT_CAPACITY = 4096
"""Bytes that wait at most for a guest that does not read."""


def _nobody() -> None:
    """Wake no one: nobody types yet."""


class ConsoleInput:
    """A bounded queue of bytes, filled by one task of the event loop and emptied by vCPU threads; neither ever waits.

    Lock order: the queue's lock is the innermost; ``wake`` is called without it.

    Args:
        capacity: bytes that wait at most.

    Raises:
        ValueError: ``capacity`` is below 1.
    """

    def __init__(self, capacity: int = DEFAULT_CAPACITY) -> None:
        if capacity < 1:
            raise ValueError(f"needs room for at least one byte, not {capacity}")
        self._capacity = capacity
        self._lock = threading.Lock()
        self._bytes = bytearray()
        self._wake: Callable[[], None] = _nobody
        self._arrived: Callable[[], None] = _nobody

    @property
    def waiting(self) -> bool:
        """Whether there is a byte to take."""
        return bool(self._bytes)

    def offer(self, data: bytes) -> int:
        """Add as much of ``data`` as there is room for, and return how many bytes that were."""
        with self._lock:
            taken = data[: self._capacity - len(self._bytes)]
            self._bytes += taken
        if taken:
            self._arrived()
        return len(taken)

    def take(self) -> int | None:
        """Return the next byte, 0 to 255, or None where there is none. Called from vCPU threads."""
        with self._lock:
            if not self._bytes:
                return None
            byte = self._bytes.pop(0)
            wake = _nobody if self._bytes else self._wake
        wake()
        return byte

    def set_arrived(self, arrived: Callable[[], None]) -> None:
        """Call ``arrived`` from now on when bytes came in, for a device that interrupts.

        It must neither block nor raise. To be set before the first vCPU runs.
        """
        self._arrived = arrived

    def set_wake(self, wake: Callable[[], None]) -> None:
        """Call ``wake`` from now on, from any thread, when the last byte was taken. It must neither block nor raise."""
        with self._lock:
            self._wake = wake
