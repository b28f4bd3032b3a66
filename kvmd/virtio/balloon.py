"""The traditional memory balloon: clause 5.5 of virtio 1.2, with free page reporting."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

import structlog
import trio

from kvmd.errors import BackendError
from kvmd.ranges import GPA_LIMIT, GpaRange
from kvmd.units import PAGE_SIZE, page_ceil, page_floor
from kvmd.virtio.abi import DeviceId
from kvmd.virtio.activation import Activation
from kvmd.virtio.device_model import Host
from kvmd.virtio.live_queue import LiveQueue
from kvmd.virtio.memory import GuestMemory, Segments, gather, split
from kvmd.virtio.split_queue import Chain

F_DEFLATE_ON_OOM = 1 << 2
F_PAGE_REPORTING = 1 << 5

INFLATE, DEFLATE = 0, 1
REPORTING = (2, 3, 4)
"""Queues. The standard numbers the reporting queue 4; Linux leaves the queues of features that were not negotiated
(statistics, free page hints) out of the count, and so it is 2. Neither of those is offered: whichever of the three is
set up is it."""

QUEUE_SIZE = 128
PAGE_NUMBERS_BYTES = 1 << 16
"""Page numbers handled at once. Linux sends 1 KiB of them."""

DISCARD_BYTES = 1 << 26
"""Discarded at once: a reset, and a conversion, wait for that."""

_CONFIG = struct.Struct("<IIII")
_PAGE_NUMBER = struct.Struct("<I")
_ACTUAL_OFFSET = 4
_PAGE_LIMIT = 0xFFFFFFFF

_log = structlog.get_logger(__name__)


class BalloonDevice:
    """Memory that the guest does without, given back to the host.

    Discarding is done by a worker thread: the kernel takes its time for large ranges.

    Args:
        discard: gives a range back to the host; called in a worker thread. It decides what of the range is the host's
            to take: ``HostAccessor.discard`` passes over private pages and what is no memory.
    """

    device_id = DeviceId.BALLOON
    queue_sizes = (QUEUE_SIZE,) * 5
    features = F_DEFLATE_ON_OOM | F_PAGE_REPORTING

    def __init__(self, discard: Callable[[GpaRange], int]) -> None:
        self._discard = discard
        self._host: Host | None = None
        self._target_pages = 0
        self._actual_pages = 0
        self._discarded_bytes = 0
        self._complained = False
        self._limiter = trio.CapacityLimiter(1)

    @property
    def config(self) -> bytes:
        """The struct virtio_balloon_config, after a reset."""
        return _CONFIG.pack(self._target_pages, 0, 0, 0)

    @property
    def target_bytes(self) -> int:
        """What the guest is asked to do without."""
        return self._target_pages * PAGE_SIZE

    @property
    def actual_bytes(self) -> int:
        """What the guest says it does without."""
        return self._actual_pages * PAGE_SIZE

    @property
    def discarded_bytes(self) -> int:
        """What the host has taken back so far, by inflation and by reports of free pages."""
        return self._discarded_bytes

    def set_target(self, size_bytes: int) -> None:
        """Ask the guest to do without that much; the guest may not.

        Raises:
            ValueError: not a multiple of the page, negative, or 16 TiB and more.
        """
        if size_bytes % PAGE_SIZE or not 0 <= size_bytes // PAGE_SIZE <= _PAGE_LIMIT:
            raise ValueError(f"a balloon of {size_bytes} bytes: it must be a multiple of {PAGE_SIZE}, below 16 TiB")
        self._target_pages = size_bytes // PAGE_SIZE
        if self._host is not None:
            self._host.set_config(_CONFIG.pack(self._target_pages, self._actual_pages, 0, 0))

    def bind(self, host: Host) -> None:
        """Remember where a change of the target is told."""
        self._host = host

    def refusal(self, features: int) -> str | None:  # noqa: ARG002 - the protocol has it
        """Any choice of features will do."""
        return None

    def config_written(self, offset: int, data: bytes) -> bytes | None:
        """Take ``actual``, which is the driver's to write."""
        if offset != _ACTUAL_OFFSET or len(data) != 4:  # noqa: PLR2004 - the field's size
            return None
        self._actual_pages = int.from_bytes(data, "little")
        return _CONFIG.pack(self._target_pages, self._actual_pages, 0, 0)

    async def run(self, active: Activation) -> None:
        """Serve the queues until cancelled."""
        self._actual_pages = 0
        inflate, deflate = active.queue(INFLATE), active.queue(DEFLATE)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._serve, inflate, _inflated, active)
            nursery.start_soon(self._serve, deflate, _nothing, active)
            if active.features & F_PAGE_REPORTING:
                for index in REPORTING:
                    if index in active.queues:
                        nursery.start_soon(self._serve, active.queues[index], _reported, active)

    async def _serve(self, queue: LiveQueue, ranges_of: RangesOf, active: Activation) -> None:
        while True:
            with queue as ring:
                chain = ring.pop()
                more = chain is not None or ring.arm()
                if chain is not None:
                    # After a reset the pages are the guest's again: it waits for what is being discarded.
                    active.transfers.begin()
                    active.work.begin()
            if chain is not None:
                await self._take(queue, ranges_of(queue, active.memory, chain), active)
                with queue as ring:
                    ring.push(chain, 0)
            elif more:
                await trio.lowlevel.checkpoint()
            else:
                await queue.wait()

    async def _take(self, queue: LiveQueue, ranges: Iterator[GpaRange], active: Activation) -> None:
        started = False

        def work() -> None:
            nonlocal started
            started = True
            try:
                self._discard_all(queue, ranges)
            finally:
                active.transfers.end()
                active.work.end()

        try:
            await trio.to_thread.run_sync(work, limiter=self._limiter)
        finally:
            if not started:
                active.transfers.end()
                active.work.end()

    def _discard_all(self, queue: LiveQueue, ranges: Iterator[GpaRange]) -> None:
        for range_ in ranges:
            for start in range(range_.start, range_.end, DISCARD_BYTES):
                if queue.stopped:
                    return
                try:
                    done = self._discard(GpaRange(start, min(start + DISCARD_BYTES, range_.end)))
                except BackendError as error:
                    # The guest lost nothing by it, and the host has as much memory as before.
                    if not self._complained:
                        self._complained = True
                        _log.warning("balloon", problem="memory is not given back", error=str(error))
                    return
                self._discarded_bytes += done

    def close(self) -> None:
        """Do nothing: it holds nothing."""


RangesOf = Callable[[LiveQueue, GuestMemory, Chain], Iterator[GpaRange]]
"""What a buffer says that the guest does without; reads guest memory as it goes."""


def _nothing(_queue: LiveQueue, _memory: GuestMemory, _chain: Chain) -> Iterator[GpaRange]:
    """Of the deflate queue: the pages come back when they are touched."""
    return iter(())


def _inflated(queue: LiveQueue, memory: GuestMemory, chain: Chain) -> Iterator[GpaRange]:
    """Of the inflate queue: 32-bit numbers of 4 KiB pages, in any order."""
    rest: Segments = chain.readable
    while rest:
        piece, rest = split(rest, PAGE_NUMBERS_BYTES)
        with queue:
            data = gather(memory, piece)
        pages = sorted({page for (page,) in _PAGE_NUMBER.iter_unpack(data[: len(data) & ~3])})
        first = 0
        for past in range(1, len(pages) + 1):
            if past == len(pages) or pages[past] != pages[past - 1] + 1:
                yield GpaRange(pages[first] * PAGE_SIZE, (pages[past - 1] + 1) * PAGE_SIZE)
                first = past


def _reported(_queue: LiveQueue, _memory: GuestMemory, chain: Chain) -> Iterator[GpaRange]:
    """Of the reporting queue: the buffer is the free memory itself."""
    for gpa, size_bytes in chain.writable:
        start, end = page_ceil(gpa), min(page_floor(gpa + size_bytes), GPA_LIMIT)
        if start < end:
            yield GpaRange(start, end)
