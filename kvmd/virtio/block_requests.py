"""The requests of a block device: taken from the queue, carried out, answered. Clause 5.2.6 of virtio 1.2."""

from __future__ import annotations

import mmap
import struct
from collections import deque
from contextlib import suppress
from dataclasses import dataclass

import structlog

from kvmd.virtio.abi import SECTOR_BYTES
from kvmd.virtio.activation import Activation
from kvmd.virtio.disk import RawDisk
from kvmd.virtio.live_queue import LiveQueue, QueueStopped, Ring
from kvmd.virtio.memory import PART_BYTES, Segments, gather, scatter, split, total_bytes, views
from kvmd.virtio.split_queue import Chain, QueueError

T_IN = 0
T_OUT = 1
T_FLUSH = 4
T_GET_ID = 8
T_DISCARD = 11
T_WRITE_ZEROES = 13

S_OK = 0
S_IOERR = 1
S_UNSUPP = 2

SIZE_LIMIT = 1 << 20
"""Bytes of one data part (size_max)."""

REQUEST_LIMIT = 64 << 20
"""Bytes of one request: more is an I/O error. Linux asks for 1280 KiB at most."""

INLINE_LIMIT = 1 << 20
"""Bytes that the event loop's thread copies out of the page cache for one turn: some 100 microseconds."""

DISCARD_LIMIT_SECTORS = 1 << 21
ZEROES_LIMIT_SECTORS = 1 << 17
SEGMENTS_LIMIT = 16
"""What one discard (1 GiB a segment) or write of zeros (64 MiB) may ask for."""

BATCH = 64
"""Requests taken before others have the event loop again."""

ERRORS_LOGGED = 8
"""Of one disk: a guest that resets the device and asks again does not fill the log."""

_HEADER = struct.Struct("<IIQ")
_SEGMENT = struct.Struct("<QII")
_UNMAP = 1
_BOUNCE_BYTES = 1 << 20

_log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Request:
    """One request that needs a worker.

    Attributes:
        chain: the buffer that it came in.
        kind: its type.
        offset: first byte on the disk.
        data: its data in guest memory; for T_DISCARD and T_WRITE_ZEROES nothing.
        status_gpa: where the status byte goes.
        views: the data itself, where memory never converts: then I/O goes straight there, and is counted.
        ranges: for T_DISCARD and T_WRITE_ZEROES: (offset, bytes, unmap).
    """

    chain: Chain
    kind: int
    offset: int
    data: Segments
    status_gpa: int
    views: list[memoryview] | None = None
    ranges: list[tuple[int, int, bool]] | None = None


class BlockRequests:
    """The requests of one activation.

    ``take`` runs in the event loop's thread, ``perform`` in workers. A request's data moves in one of two ways. Where
    memory never converts, the disk reads and writes guest memory itself, and a reset waits for that. Where a page may
    turn private at any time, I/O that may block goes through a buffer of kvmd's, and is copied under the memory's
    ``hold``: a conversion must not wait for a disk.

    Args:
        disk: the disk.
        serial: 20 bytes that T_GET_ID answers.
        queue: where the requests come from.
        active: the activation.
        stable: each write must be on the disk before it is answered, since the driver will not flush.

    Attributes:
        waiting: requests for workers; a deque, so that any thread may take one.
        workers: worker threads at it.
    """

    def __init__(self, disk: RawDisk, serial: bytes, queue: LiveQueue, active: Activation, *, stable: bool) -> None:
        self.queue = queue
        self.waiting: deque[Request] = deque()
        self.workers = 0
        self._disk = disk
        self._serial = serial
        self._active = active
        self._memory = active.memory
        self._direct = not active.memory.converts
        self._stable = stable
        self._align_mask = disk.block_bytes - 1
        # One for each worker at most; a mapping, since that is aligned to a page, as O_DIRECT wants.
        self._buffers: list[memoryview] = []

    # -- the event loop's thread ---------------------------------------------------------------------------------------

    def take(self) -> bool:
        """Take what the driver made available; true where there may be more.

        Raises:
            QueueStopped: the device was reset, or failed.
        """
        inline = 0
        with self.queue as ring:
            ring.disarm()
            for _ in range(BATCH):
                chain = ring.pop()
                if chain is None:
                    return ring.arm()
                inline += self._begin(ring, chain) + PART_BYTES * (len(chain.readable) + len(chain.writable))
                if inline >= INLINE_LIMIT:
                    break
        return True

    def needs_worker(self, limit: int) -> bool:
        """Tell whether one more worker would have something to do."""
        return self.workers < min(len(self.waiting), limit)

    def _begin(self, ring: Ring, chain: Chain) -> int:
        """Answer a request at once, or leave it to a worker; return the bytes that were copied here."""
        head, rest = split(chain.readable, _HEADER.size)
        header = gather(self._memory, head) if head else b""
        if len(header) != _HEADER.size or not chain.writable:
            raise QueueError(
                f"a block request with {len(header)} bytes of header and {len(chain.writable)} parts to write"
            )
        kind, _, sector = _HEADER.unpack(header)
        gpa, size_bytes = chain.writable[-1]
        status_gpa = gpa + size_bytes - 1
        match kind:
            case 0 | 1:
                return self._begin_io(ring, chain, kind, sector, rest, status_gpa)
            case 4:
                self._leave_to_worker(Request(chain, kind, 0, (), status_gpa))
            case 8:
                into, _ = split(chain.writable, total_bytes(chain.writable) - 1)
                done = scatter(self._memory, into, self._serial)
                self._answer(ring, chain, status_gpa, S_OK if done == len(self._serial) else S_IOERR, done)
            case 11 | 13 if not self._disk.read_only:
                ranges = self._ranges(kind, rest)
                if isinstance(ranges, int):
                    self._answer(ring, chain, status_gpa, ranges)
                else:
                    self._leave_to_worker(Request(chain, kind, 0, (), status_gpa, ranges=ranges))
            case _:
                self._answer(ring, chain, status_gpa, S_UNSUPP)
        return 0

    def _begin_io(self, ring: Ring, chain: Chain, kind: int, sector: int, rest: Segments, status_gpa: int) -> int:
        if kind == T_IN:
            data: Segments
            gpa, last = chain.writable[-1]
            data = chain.writable[:-1] if last == 1 else [*chain.writable[:-1], (gpa, last - 1)]
        else:
            data = rest
        size_bytes = total_bytes(data)
        offset = sector * SECTOR_BYTES
        if (
            size_bytes % SECTOR_BYTES
            or size_bytes > REQUEST_LIMIT
            or offset + size_bytes > self._disk.size_bytes
            or (kind == T_OUT and self._disk.read_only)
        ):
            self._answer(ring, chain, status_gpa, S_IOERR)
            return 0
        into = views(self._memory, data)
        if kind == T_IN and size_bytes <= INLINE_LIMIT and self._disk.read_now(into, offset, size_bytes):
            self._answer(ring, chain, status_gpa, S_OK, size_bytes)
            return size_bytes
        request = Request(chain, kind, offset, data, status_gpa)
        if self._direct:
            request.views = into
            self._active.transfers.begin()
        self._leave_to_worker(request)
        return 0

    def _leave_to_worker(self, request: Request) -> None:
        self._active.work.begin()
        self.waiting.append(request)

    def _ranges(self, kind: int, data: Segments) -> list[tuple[int, int, bool]] | int:
        """Return what is to be discarded or zeroed, or the status of a request that cannot be."""
        size_bytes = total_bytes(data)
        if not size_bytes or size_bytes % _SEGMENT.size or size_bytes > SEGMENTS_LIMIT * _SEGMENT.size:
            return S_IOERR
        limit = DISCARD_LIMIT_SECTORS if kind == T_DISCARD else ZEROES_LIMIT_SECTORS
        ranges = []
        for sector, sectors, flags in _SEGMENT.iter_unpack(gather(self._memory, data)):
            if flags & ~_UNMAP or (kind == T_DISCARD and flags):
                return S_UNSUPP
            if sectors > limit or (sector + sectors) * SECTOR_BYTES > self._disk.size_bytes:
                return S_IOERR
            if sectors:
                ranges.append((sector * SECTOR_BYTES, sectors * SECTOR_BYTES, bool(flags)))
        return ranges

    def _answer(self, ring: Ring, chain: Chain, status_gpa: int, status: int, read_bytes: int = 0) -> None:
        self._memory.view(status_gpa, 1)[0] = status
        ring.push(chain, read_bytes + 1)

    def drop(self) -> None:
        """Forget what waits: the device was reset, or is closed. ``take`` is not called any more."""
        with suppress(IndexError):
            while True:
                if self.waiting.popleft().views is not None:
                    self._active.transfers.end()
                self._active.work.end()

    # -- a worker's thread ---------------------------------------------------------------------------------------------

    def perform(self) -> None:
        """Carry out what waits until nothing does."""
        while True:
            try:
                request = self.waiting.popleft()
            except IndexError:
                return
            try:
                if not self.queue.stopped:
                    self._perform(request)
            except QueueStopped:
                pass  # reset in the meantime: what waits still has to be taken off
            finally:
                if request.views is not None:
                    self._active.transfers.end()
                self._active.work.end()

    def _perform(self, request: Request) -> None:
        try:
            self._io(request)
            status = S_OK
        except OSError as error:
            status = S_IOERR
            self._disk.errors += 1
            if self._disk.errors <= ERRORS_LOGGED:
                _log.warning("disk error", disk=self._disk.path, offset=request.offset, error=error.strerror)
        read_bytes = total_bytes(request.data) if request.kind == T_IN and status == S_OK else 0
        with self.queue as ring:
            self._answer(ring, request.chain, request.status_gpa, status, read_bytes)

    def _io(self, request: Request) -> None:
        match request.kind:
            case 0 | 1 if request.views is not None:
                self._straight(request, request.views)
            case 0 | 1:
                self._bounced(request)
            case 4:
                self._disk.flush()
            case _:
                for offset, size_bytes, unmap in request.ranges or ():
                    if self.queue.stopped:
                        return  # zeros that have to be written take their time, and nobody waits for them any more
                    if request.kind == T_DISCARD:
                        self._disk.discard(offset, size_bytes)
                    else:
                        self._disk.zero(offset, size_bytes, unmap=unmap, stable=self._stable)

    def _straight(self, request: Request, data: list[memoryview]) -> None:
        # A gpa is as aligned as its address in this process: guest memory starts at a page.
        bits = request.offset
        for gpa, size_bytes in request.data:
            bits |= gpa | size_bytes
        aligned = not bits & self._align_mask
        if request.kind == T_IN:
            self._disk.read(data, request.offset, aligned=aligned)
        else:
            self._disk.write(data, request.offset, aligned=aligned, stable=self._stable)

    def _bounced(self, request: Request) -> None:
        buffer = self._buffers.pop() if self._buffers else memoryview(mmap.mmap(-1, _BOUNCE_BYTES))
        try:
            self._bounced_through(buffer, request)
        finally:
            self._buffers.append(buffer)

    def _bounced_through(self, buffer: memoryview, request: Request) -> None:
        rest: Segments = request.data
        offset = request.offset
        while rest:
            part, rest = split(rest, len(buffer))
            size_bytes = total_bytes(part)
            piece = buffer[:size_bytes]
            aligned = not (offset | size_bytes) & self._align_mask
            if request.kind == T_IN:
                self._disk.read([piece], offset, aligned=aligned)
                with self.queue:
                    scatter(self._memory, part, piece)
            else:
                with self.queue:
                    at = 0
                    for view in views(self._memory, part):
                        piece[at : at + len(view)] = view
                        at += len(view)
                self._disk.write([piece], offset, aligned=aligned, stable=self._stable)
            offset += size_bytes
