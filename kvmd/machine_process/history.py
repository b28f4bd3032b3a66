"""The last bytes of an endless output, with their place in it: plain, without I/O."""

from __future__ import annotations

from typing import NamedTuple


class Piece(NamedTuple):
    """Some bytes of an output.

    Attributes:
        dropped: bytes before ``start`` that were asked for and are not kept any more.
        start: the place of the first byte, counted from the output's first.
        data: the bytes; none where there is nothing there yet.
    """

    dropped: int
    start: int
    data: bytes

    @property
    def end(self) -> int:
        """The place after the last byte: where to go on."""
        return self.start + len(self.data)


class ByteHistory:
    """The last ``capacity`` bytes of an output; one thread at a time.

    Args:
        capacity: bytes kept.
        start: the place of the first byte to come: not 0 where an output goes on.

    Raises:
        ValueError: ``capacity`` is below 1.
    """

    def __init__(self, capacity: int, start: int = 0) -> None:
        if capacity < 1:
            raise ValueError(f"needs room for at least one byte, not {capacity}")
        self._capacity = capacity
        self._kept = bytearray()
        self._start = start

    @property
    def start(self) -> int:
        """The place of the oldest byte that is kept."""
        return self._start

    @property
    def end(self) -> int:
        """The place of the next byte to come."""
        return self._start + len(self._kept)

    def append(self, data: bytes) -> None:
        """Add ``data`` and forget what is too old."""
        self._kept += data
        excess = len(self._kept) - self._capacity
        if excess > 0:
            del self._kept[:excess]
            self._start += excess

    def read(self, offset: int, limit: int) -> Piece:
        """Return at most ``limit`` bytes from ``offset`` on; one beyond the end counts as the end."""
        start = min(max(offset, self._start), self.end)
        at = start - self._start
        return Piece(max(0, start - offset), start, bytes(self._kept[at : at + limit]))
