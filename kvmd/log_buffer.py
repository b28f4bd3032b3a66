"""A log stream that never blocks who logs: what the event loop's own log is written to."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable

CAPACITY = 1 << 20
"""Bytes that wait at most; lines beyond are dropped, and counted in the log itself."""


def _nobody() -> None:
    """Wake no one: nobody reads yet."""


class LogBuffer(io.TextIOBase):
    """A text stream of lines, emptied by ``kvmd.console_pump.OutputPump``; any thread may write.

    A log that is read too slowly loses lines, never time: a terminal held with Ctrl-S must not hold a guest.

    Args:
        is_terminal: what ``isatty`` says: whether the lines will end on a terminal.
        capacity: bytes that wait at most.
    """

    def __init__(self, *, is_terminal: bool, capacity: int = CAPACITY) -> None:
        super().__init__()
        self._is_terminal = is_terminal
        self._capacity = capacity
        self._lock = threading.Lock()
        self._bytes = bytearray()
        self._lost = 0
        self._wake: Callable[[], None] = _nobody

    def writable(self) -> bool:
        """Say that it can be written."""
        return True

    def isatty(self) -> bool:
        """Tell whether the lines will end on a terminal."""
        return self._is_terminal

    def write(self, text: str) -> int:
        """Add ``text``, whole lines, or drop it and count its lines. Never blocks."""
        data = text.encode(errors="backslashreplace")
        with self._lock:
            if len(self._bytes) + len(data) > self._capacity:
                self._lost += data.count(b"\n")
                return len(text)
            was_empty = not self._bytes
            self._bytes += data
            wake = self._wake
        if was_empty:
            wake()
        return len(text)

    def take(self) -> bytes:
        """Return all that waits, and after it how many lines were dropped meanwhile."""
        with self._lock:
            taken = bytes(self._bytes)
            self._bytes.clear()
            lost, self._lost = self._lost, 0
        return taken + (f'{{"event": "log-lines-lost", "lost": {lost}}}\n'.encode() if lost else b"")

    def set_wake(self, wake: Callable[[], None]) -> None:
        """Call ``wake`` from now on when there is something again, and at once where there is."""
        with self._lock:
            self._wake = wake
            waiting = bool(self._bytes)
        if waiting:
            wake()
