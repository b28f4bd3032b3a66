"""An output of the machine on its way to whoever follows it: to a file, and into a bounded buffer with places."""

from __future__ import annotations

from collections.abc import Callable

import trio

from kvmd.machine_process.history import ByteHistory, Piece
from kvmd.machine_process.segments import SegmentWriter


class KeptOutput:
    """Where a pump writes one output to.

    Args:
        writer: of the files, taken over.
        capacity: bytes kept in memory.
        failed: told of the first error of a write to the files; the bytes are still in memory for a while.
    """

    def __init__(self, writer: SegmentWriter, capacity: int, failed: Callable[[OSError], None]) -> None:
        self._writer = writer
        self._history = ByteHistory(capacity, writer.end)
        self._failed = failed
        self._reported = False
        self._changed = trio.Event()

    @property
    def unwritten(self) -> int:
        """Bytes that could not be written to the files."""
        return self._writer.unwritten

    @property
    def end(self) -> int:
        """The place of the next byte to come."""
        return self._history.end

    async def write(self, data: bytes) -> None:
        """Take ``data``. It waits for nobody and fails for nothing."""
        self._history.append(data)
        try:
            self._writer.append(data)
        except OSError as error:
            if not self._reported:
                self._reported = True
                self._failed(error)
        event, self._changed = self._changed, trio.Event()
        event.set()
        await trio.lowlevel.checkpoint()

    async def read(self, offset: int, limit: int) -> Piece:
        """Return what there is from ``offset`` on, once there is something."""
        while not (piece := self._history.read(offset, limit)).data:
            await self._changed.wait()
        await trio.lowlevel.checkpoint()
        return piece

    def kept(self, offset: int, limit: int) -> Piece:
        """Return what there is from ``offset`` on now; no data where there is none."""
        return self._history.read(offset, limit)

    def close(self) -> None:
        """Close the files."""
        self._writer.close()
