"""A machine's conversions on their way into files, so that those of a process that dies are not lost with it.

While the machine lives its ring answers whoever asks; this is for afterwards. A follower of the ring writes what is
new, at once after a pause and then every 20 ms, so what a violent end costs is what those 20 ms held. It is a task like
any reader of the ring: a vCPU never waits for it, and what it was too slow for is a gap in the sequence. The files are
those of ``kvmd.machine_process.segments``, named ``conversions-PLACE``: writes go to the page cache, which outlives the
process, and a disk that is full is an error of one write. (A file that is mapped instead ends the process with SIGBUS
then.)

A segment is a series of frames: a length (4 bytes, big-endian), and that many bytes of MessagePack, an array of
records, each an array of the members of ``ConversionRecord`` in their order, some 100 bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

import msgspec
import trio

from kvmd.conversion.record import ConversionRecord
from kvmd.conversion.ring import RecordReader
from kvmd.conversion_log import GATHER_SECONDS, RecordFollower
from kvmd.machine_process.folder import LAST_CONVERSIONS, LAST_RECORDS, LastConversions, MachineFolder
from kvmd.machine_process.segments import SEGMENTS_KEPT, SegmentWriter, read_segments, remove_segments, segments_of

CONVERSIONS = "conversions"
SEGMENT_BYTES = 2 << 20
"""Two of them are kept, one of which is whole: more than ``LAST_RECORDS`` records."""

_READ_LIMIT = 2 * SEGMENT_BYTES
"""Of one segment: more than any has that was written here."""

_BATCH = 256
_LENGTH = struct.Struct(">I")


class _Row(ConversionRecord, frozen=True, gc=False, array_like=True):
    """A record without the names of its members."""


_rows = msgspec.msgpack.Decoder(list[_Row])
_encoder = msgspec.msgpack.Encoder()


class ConversionKeeper(RecordFollower):
    """Writes the conversions of one machine into its folder.

    Args:
        reader: where they come from.
        folder: descriptor of the folder, borrowed. What another life of the machine left there is deleted.
        failed: told of the first error of a write.
        segment_bytes: size at which the next segment begins.
    """

    def __init__(
        self,
        reader: RecordReader,
        folder: int,
        failed: Callable[[OSError], None],
        *,
        segment_bytes: int = SEGMENT_BYTES,
    ) -> None:
        super().__init__(reader)
        self._folder = folder
        self._failed = failed
        self._reported = False
        remove_segments(folder, CONVERSIONS)
        self._writer = SegmentWriter(folder, CONVERSIONS, segment_bytes=segment_bytes)

    async def run(self) -> None:
        """Write until ``end`` was called."""
        while not self._ended.is_set():
            await self._wait_for_records()
            await self._write_unread()
            await self._gather(GATHER_SECONDS)
        await self._write_unread()

    def close(self) -> None:
        """Close the files."""
        self._writer.close()

    def discard(self) -> None:
        """Delete the files: what they hold is kept elsewhere."""
        self.close()
        try:
            remove_segments(self._folder, CONVERSIONS)
        except OSError as error:
            self._failed(error)

    async def _write_unread(self) -> None:
        while self._reader.unread:
            _, records = self._reader.take(_BATCH)
            try:
                self._writer.append(_frame(records))
            except OSError as error:
                if not self._reported:
                    self._reported = True
                    self._failed(error)
            await trio.lowlevel.checkpoint()


def conversions_left(folder: MachineFolder) -> LastConversions | None:
    """Return the last conversions of a machine whose process is gone, or None where it left none.

    Raises:
        BadFile: they cannot be read.
    """
    last = folder.read(LAST_CONVERSIONS, LastConversions)
    if last is not None:
        return last
    try:
        records = _read(folder.fd)[-LAST_RECORDS:]
    except FileNotFoundError:
        return None
    return LastConversions(records[-1].sequence, records) if records else None


def settle_conversions(folder: MachineFolder) -> LastConversions | None:
    """Return what ``conversions_left`` does, and put it where an end in order puts it: there it is read much faster.

    Raises:
        BadFile: they cannot be read.
        OSError: they stay where they are.
    """
    left = conversions_left(folder)
    if left is not None:
        if segments_of(folder.fd, CONVERSIONS):
            folder.write(LAST_CONVERSIONS, left)
        remove_segments(folder.fd, CONVERSIONS)
    return left


def _frame(records: list[ConversionRecord]) -> bytes:
    data = _encoder.encode([msgspec.structs.astuple(record) for record in records])
    return _LENGTH.pack(len(data)) + data


def _read(folder: int) -> list[ConversionRecord]:
    """Return all records that the segments hold; half a frame, at a violent end or on a full disk, is passed over."""
    found: list[ConversionRecord] = []
    last = 0
    for start, _ in segments_of(folder, CONVERSIONS)[-SEGMENTS_KEPT:]:
        for rows in _frames(read_segments(folder, CONVERSIONS, start, _READ_LIMIT).data):
            for row in rows:
                if row.sequence > last:
                    found.append(ConversionRecord(*msgspec.structs.astuple(row)))
                    last = row.sequence
    return found


def _frames(data: bytes) -> Iterator[list[_Row]]:
    """Yield what each frame of a segment holds, up to the first that is not whole."""
    at = 0
    while at + _LENGTH.size <= len(data):
        (length,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        if length > len(data) - at:
            return
        try:
            yield _rows.decode(memoryview(data)[at : at + length])
        except (msgspec.MsgspecError, ValueError):
            return
        at += length
