"""What a guest prints, on its way from the vCPU threads to the event loop."""

from __future__ import annotations

import threading
from collections.abc import Callable

DEFAULT_CAPACITY = 65536
"""Bytes that wait at most before a vCPU that prints has to."""


TAIL_BYTES = 4096
"""Bytes of the last output that are kept, to say what a guest that panicked said last."""


def _nobody() -> None:
    """Wake no one: nobody reads yet."""


class ConsoleOutput:
    """A bounded buffer of bytes, filled by vCPU threads and emptied by one task of the event loop.

    A full buffer blocks the vCPU that prints, so that a slow terminal loses nothing. A pause or a stop must
    not wait for a terminal: ``release`` lets every blocked vCPU go, and until ``restore`` bytes are
    accepted beyond the bound (few: a vCPU that leaves the guest has at most one exit's worth of them).

    Lock order: the buffer's lock is the innermost; ``wake`` is called without it.

    Args:
        capacity: bytes that wait at most.
        wake: called from vCPU threads when the buffer was empty and no longer is. Must be thread-safe, must
            not block and must not raise.

    Raises:
        ValueError: ``capacity`` is below 1.
    """

    def __init__(self, capacity: int = DEFAULT_CAPACITY, wake: Callable[[], None] = _nobody) -> None:
        if capacity < 1:
            raise ValueError(f"needs room for at least one byte, not {capacity}")
        self._capacity = capacity
        self._wake = wake
        self._room = threading.Condition(threading.Lock())
        self._bytes = bytearray()
        self._released = 0
        self._total = 0
        self._taken_last = b""

    @property
    def total_bytes(self) -> int:
        """Bytes printed so far."""
        return self._total

    def tail(self) -> bytes:
        """Return the last that was printed, up to ``TAIL_BYTES``, whether it was taken or not."""
        with self._room:
            return (self._taken_last + self._bytes)[-TAIL_BYTES:]

    def put(self, byte: int) -> None:
        """Add one byte, 0 to 255. Blocks the calling thread while the buffer is full and not released."""
        with self._room:
            while len(self._bytes) >= self._capacity and not self._released:
                self._room.wait()
            was_empty = not self._bytes
            self._bytes.append(byte)
            self._total += 1
            wake = self._wake
        if was_empty:
            wake()

    def take(self) -> bytes:
        """Return all that waits, perhaps nothing, and make room. Never blocks."""
        with self._room:
            taken = bytes(self._bytes)
            self._bytes.clear()
            self._taken_last = (self._taken_last + taken)[-TAIL_BYTES:]
            self._room.notify_all()
        return taken

    def set_wake(self, wake: Callable[[], None]) -> None:
        """Call ``wake`` from now on, and at once where bytes wait already."""
        with self._room:
            self._wake = wake
            waiting = bool(self._bytes)
        if waiting:
            wake()

    def release(self) -> None:
        """Let blocked vCPUs go and block no other until as many calls of ``restore``. From any thread."""
        with self._room:
            self._released += 1
            self._room.notify_all()

    def restore(self) -> None:
        """Undo one ``release``.

        Raises:
            ValueError: there was none to undo.
        """
        with self._room:
            if not self._released:
                raise ValueError("restore without a release")
            self._released -= 1
