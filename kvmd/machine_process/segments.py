"""An endless output in files of bounded size: the console and the log of a machine, kept whatever becomes of it.

Each file (*segment*) is named ``<output>-<place of its first byte>``, so that the files say themselves what they hold:
whoever comes later finds any byte by its place, and sees a gap (a disk that was full) as a place that no segment has.
The newest segments are kept, the others deleted as new ones begin.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress

from kvmd.machine_process.history import Piece

SEGMENT_BYTES = 1 << 20
SEGMENTS_KEPT = 2

_PLACE = re.compile(r"[0-9]{20}")


class SegmentWriter:
    """Appends to an output; one thread at a time. ``append`` writes to the page cache and does not wait for the disk.

    Args:
        folder: descriptor of the folder, borrowed.
        output: the output's name.
        segment_bytes: size at which the next segment begins.
        kept: how many segments are kept, the one that is written to included.
    """

    def __init__(
        self, folder: int, output: str, *, segment_bytes: int = SEGMENT_BYTES, kept: int = SEGMENTS_KEPT
    ) -> None:
        self._folder = folder
        self._output = output
        self._segment_bytes = segment_bytes
        self._kept = kept
        self._fd = -1
        self._start = 0
        self._size = 0
        self._new = False
        found = segments_of(folder, output)
        self._end = max((start + size for start, size in found), default=0)
        self.unwritten = 0
        """Bytes that could not be written."""

    @property
    def end(self) -> int:
        """The place of the next byte."""
        return self._end

    def append(self, data: bytes) -> None:
        """Write ``data``; what cannot be written is counted, leaves a gap, and the next append goes on after it.

        Raises:
            OSError: some of it was not written.
        """
        rest = memoryview(data)
        try:
            while rest:
                if self._fd < 0 or self._size >= self._segment_bytes:
                    self._begin()
                written = os.write(self._fd, rest[: self._segment_bytes])
                self._size += written
                self._end += written
                rest = rest[written:]
            self._prune()
        except OSError:
            self.unwritten += len(rest)
            self._end += len(rest)
            self._give_up()
            raise

    def close(self) -> None:
        """Close the file; harmless the second time."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _begin(self) -> None:
        self.close()
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        self._fd = os.open(_name(self._output, self._end), flags, 0o600, dir_fd=self._folder)
        self._size = 0
        self._start = self._end
        self._new = True

    def _prune(self) -> None:
        """Delete the oldest segments for a new one, once that holds something."""
        if self._new and self._size:
            self._new = False
            for start, _ in segments_of(self._folder, self._output)[: -self._kept]:
                os.unlink(_name(self._output, start), dir_fd=self._folder)

    def _give_up(self) -> None:
        """Leave the segment as it is; one that got nothing at all must not take an older one's place."""
        if self._fd >= 0 and not self._size:
            with suppress(OSError):
                os.unlink(_name(self._output, self._start), dir_fd=self._folder)
        self.close()


def segments_of(folder: int, output: str) -> list[tuple[int, int]]:
    """Return place and size of all segments of an output, in order.

    Args:
        folder: descriptor of the folder.
        output: the output's name.
    """
    found = []
    for name in os.listdir(folder):
        prefix, _, place = name.rpartition("-")
        if prefix == output and _PLACE.fullmatch(place):
            try:
                found.append((int(place), os.stat(name, dir_fd=folder, follow_symlinks=False).st_size))
            except FileNotFoundError:
                continue  # its time had come
    return sorted(found)


def remove_segments(folder: int, output: str) -> None:
    """Delete all of an output.

    Raises:
        OSError: a segment cannot be deleted.
    """
    for start, _ in segments_of(folder, output):
        os.unlink(_name(output, start), dir_fd=folder)


def read_segments(folder: int, output: str, offset: int, limit: int) -> Piece:
    """Return at most ``limit`` bytes of an output from ``offset`` on; bytes that no segment has count as dropped.

    Nothing where there is nothing at ``offset`` or after it.

    Raises:
        OSError: a segment cannot be read.
    """
    for start, size in segments_of(folder, output):
        if start + size <= offset:
            continue
        begin = max(start, offset)
        try:
            fd = os.open(_name(output, start), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=folder)
        except FileNotFoundError:
            continue
        try:
            data = os.pread(fd, limit, begin - start)
        finally:
            os.close(fd)
        if data:
            return Piece(begin - offset, begin, data)
    return Piece(0, offset, b"")


def _name(output: str, place: int) -> str:
    return f"{output}-{place:020d}"
