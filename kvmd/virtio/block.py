"""The virtio block device: clause 5.2 of virtio 1.2, on a raw disk."""

from __future__ import annotations

import hashlib
import struct

import trio

from kvmd.virtio.abi import SECTOR_BYTES, DeviceId
from kvmd.virtio.activation import Activation
from kvmd.virtio.block_requests import (
    DISCARD_LIMIT_SECTORS,
    SEGMENTS_LIMIT,
    SIZE_LIMIT,
    ZEROES_LIMIT_SECTORS,
    BlockRequests,
)
from kvmd.virtio.device_model import PlainModel
from kvmd.virtio.disk import RawDisk

F_SIZE_MAX = 1 << 1
F_SEG_MAX = 1 << 2
F_RO = 1 << 5
F_BLK_SIZE = 1 << 6
F_FLUSH = 1 << 9
F_TOPOLOGY = 1 << 10
F_DISCARD = 1 << 13
F_WRITE_ZEROES = 1 << 14

QUEUE_SIZE = 256
DATA_SEGMENTS = QUEUE_SIZE - 2
"""Data parts of one request: besides them it has a header and a status."""

WORKERS = 4
"""Requests that wait for the disk at once. More only wait in its queue instead of ours."""

_CONFIG = struct.Struct("<QIIHBBIBBHIBBHIIIIIB3x")
_PAGE_BYTES = 4096


class BlockDevice(PlainModel):
    """A disk.

    What the host has in its page cache is read by the event loop's thread, which does not wait for it; everything else
    is done by up to ``WORKERS`` worker threads. A thread that was woken takes one request after the other: waking it
    costs more than most of them.

    Args:
        disk: the open disk, which belongs to the device from now on.
        serial: up to 20 characters of ASCII, which the guest sees; one made of the path by default.
    """

    device_id = DeviceId.BLOCK
    queue_sizes = (QUEUE_SIZE,)

    def __init__(self, disk: RawDisk, serial: str | None = None) -> None:
        self._disk = disk
        text = serial if serial is not None else hashlib.sha256(disk.path.encode()).hexdigest()[:20]
        self._serial = text.encode("ascii", "replace")[:20].ljust(20, b"\0")
        self._limiter = trio.CapacityLimiter(WORKERS)

    @property
    def features(self) -> int:
        """What is offered."""
        common = F_SIZE_MAX | F_SEG_MAX | F_BLK_SIZE | F_TOPOLOGY | F_FLUSH
        return common | (F_RO if self._disk.read_only else F_DISCARD | F_WRITE_ZEROES)

    @property
    def config(self) -> bytes:
        """The struct virtio_blk_config."""
        disk = self._disk
        physical = max(disk.block_bytes, _PAGE_BYTES)
        exponent = (physical // disk.block_bytes).bit_length() - 1
        return _CONFIG.pack(
            disk.size_bytes // SECTOR_BYTES,
            SIZE_LIMIT,
            DATA_SEGMENTS,
            *(0, 0, 0),  # no geometry
            disk.block_bytes,
            *(exponent, 0, 1, 0),  # topology: physical block, no offset, smallest and best I/O size
            *(0, 0, 1),  # no write-back switch; one queue
            DISCARD_LIMIT_SECTORS,
            SEGMENTS_LIMIT,
            physical // SECTOR_BYTES,
            ZEROES_LIMIT_SECTORS,
            SEGMENTS_LIMIT,
            1,  # write zeroes may unmap
        )

    async def run(self, active: Activation) -> None:
        """Serve the queue until cancelled; waits for the I/O under way, but begins no other."""
        requests = BlockRequests(
            self._disk, self._serial, active.queue(0), active, stable=not active.features & F_FLUSH
        )
        async with trio.open_nursery() as nursery:
            try:
                while True:
                    more = requests.take()
                    while requests.needs_worker(WORKERS):
                        requests.workers += 1
                        nursery.start_soon(self._work, requests)
                    if more:
                        await trio.lowlevel.checkpoint()
                    else:
                        await requests.queue.wait()
            finally:
                requests.drop()

    async def _work(self, requests: BlockRequests) -> None:
        try:
            while requests.waiting:
                await trio.to_thread.run_sync(requests.perform, limiter=self._limiter)
        finally:
            requests.workers -= 1

    def close(self) -> None:
        """Close the disk."""
        self._disk.close()
