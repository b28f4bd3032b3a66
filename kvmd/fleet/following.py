"""Following a machine's console or log: from its files, from its process while that lives, and from its files again."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Literal

import structlog
import trio

from kvmd.errors import MachineStateError
from kvmd.fleet.asking import connect
from kvmd.fleet.base import OutputPart
from kvmd.fleet.entry import Entry
from kvmd.fleet.streams import AGAIN_SECONDS, Stream
from kvmd.machine_process.client import ControlClient, HungUp
from kvmd.machine_process.folder import CONSOLE
from kvmd.machine_process.framing import BadMessage
from kvmd.machine_process.history import Piece
from kvmd.machine_process.messages import TYPE_LIMIT, FollowOutput, OutputPiece, Type, Typed
from kvmd.machine_process.segments import read_segments, segments_of

_READ_AT_ONCE = 64 << 10

_log: structlog.stdlib.BoundLogger = structlog.get_logger("kvmd.fleet")


class OutputFollower:
    """One reader of one output, at its own pace.

    Args:
        entry: the machine.
        output: which of its outputs; its files have the same name.
        start: the place to begin at.
        last: begin this many bytes before the end instead.
        follow: go on to the machine's end, and not only to the end of what there is now.
    """

    def __init__(
        self,
        entry: Entry,
        output: Literal["console", "log"],
        *,
        start: int = 0,
        last: int | None = None,
        follow: bool = True,
    ) -> None:
        self._entry = entry
        self._output = output
        self._follow = follow
        self._client: ControlClient | None = None
        self._offset = start
        self._began = False
        self.dropped = 0
        """Bytes that were not kept for as long as this reader took."""
        segments = segments_of(entry.folder.fd, output)
        if segments and last is not None:
            self._offset = max(0, sum(segments[-1]) - last)

    async def read(self) -> OutputPart | None:
        """Return what comes next, or None at the end."""
        await trio.lowlevel.checkpoint()
        while True:
            if self._client is None:
                ended = self._entry.ended  # first the look, then the file: nothing is written after the end
                if self._entry.deleted:
                    return None
                piece = read_segments(self._entry.folder.fd, self._output, self._offset, _READ_AT_ONCE)
                if not ended and (piece.dropped or not piece.data):
                    # What the disk had no room for may still be in the process's memory.
                    live = await self._connect()
                    if live is not None and (live.start <= piece.start or not piece.data):
                        return self._took(live)
                    await self.aclose()
                    if not piece.data:
                        continue
                return self._took(piece)
            answer = await self._client.receive()
            if isinstance(answer, OutputPiece):
                return self._took(answer)
            await self._end_or_again()

    def stream(self) -> AsyncIterator[OutputPart]:
        """Return what comes until the end, as a stream."""
        return Stream(self.read)

    async def aclose(self) -> None:
        """Hang up; harmless the second time."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    async def _connect(self) -> OutputPiece | None:
        """Follow the process, and return its first answer; None once it has ended, or where it has no room."""
        try:
            self._client = await ControlClient.connect(self._entry.folder)
            await self._client.send(FollowOutput(self._output, self._offset, self._follow))
            answer = await self._client.receive()
        except (HungUp, BadMessage):
            answer = None
        if isinstance(answer, OutputPiece):
            return answer
        await self._end_or_again()
        return None

    async def _end_or_again(self) -> None:
        """Hang up, and wait for the machine's end, or until there may be room for one more reader."""
        await self.aclose()
        with trio.move_on_after(AGAIN_SECONDS):
            await self._entry.wait(lambda: self._entry.ended)

    def _took(self, piece: Piece | OutputPiece) -> OutputPart | None:
        if not piece.data:
            return None
        # Before the first byte it is not this reader who was too slow.
        if piece.dropped and self._began:
            self.dropped += piece.dropped
            _log.warning("output-dropped", machine=self._entry.name, output=self._output, bytes=piece.dropped)
        self._began = True
        self._offset = piece.start + len(piece.data)
        return OutputPart(piece.start, piece.dropped, piece.data)


class MachineConsole:
    """A connection to a machine's console, both ways: ``kvmd.fleet.base.Console``."""

    _SHOWN_FIRST = 16 << 10

    def __init__(self, entry: Entry) -> None:
        self._entry = entry
        self._output = OutputFollower(entry, CONSOLE, last=self._SHOWN_FIRST)
        self._client: ControlClient | None = None
        self._typing = trio.Lock()

    async def receive(self) -> bytes:
        """Return the next output; empty at the machine's end."""
        part = await self._output.read()
        return b"" if part is None else part.data

    async def send(self, data: bytes) -> None:
        """Give the guest input; waits while the guest does not take it.

        Raises:
            MachineStateError: the machine has ended.
        """
        async with self._typing:
            for at in range(0, len(data), TYPE_LIMIT):
                try:
                    if self._client is None:
                        self._client = await connect(self._entry)
                    await self._client.ask(Type(data[at : at + TYPE_LIMIT]), Typed)
                except HungUp as error:
                    raise MachineStateError("type", needed="created, running or paused", found="stopped") from error
                except trio.Cancelled:
                    # Half a request was sent, or its answer is still to come.
                    await self._hang_up()
                    raise

    async def aclose(self) -> None:
        """Hang up."""
        await self._hang_up()
        await self._output.aclose()

    async def _hang_up(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()
