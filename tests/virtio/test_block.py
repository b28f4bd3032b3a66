from __future__ import annotations

import os
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from kvmd.units import KIB, MIB
from kvmd.virtio.block import BlockDevice
from kvmd.virtio.block_requests import S_OK, T_FLUSH, T_IN, T_OUT
from kvmd.virtio.disk import RawDisk
from tests.virtio.driver import Driver, Memory, driven, guest_memory

DISK_BYTES = 4 * MIB


class Disk:
    """Block requests on queue 0."""

    def __init__(self, driver: Driver, memory: Memory, path: Path) -> None:
        self.driver = driver
        self.memory = memory
        self.path = path
        self.header = memory.allocate(16)
        self.status = memory.allocate(1)
        self.buffer = memory.allocate(2 * MIB, 4096)

    async def request(
        self, kind: int, sector: int = 0, *, out: bytes = b"", in_bytes: int = 0, indirect: bool = False
    ) -> tuple[int, int]:
        """Make one request and return its status and the bytes that were written."""
        self.memory.write(self.header, struct.pack("<IIQ", kind, 0, sector))
        self.memory.write(self.status, b"\xee")
        readable = [(self.header, 16)]
        writable = [(self.status, 1)]
        if out:
            self.memory.write(self.buffer, out)
            readable.append((self.buffer, len(out)))
        if in_bytes:
            writable.insert(0, (self.buffer, in_bytes))
        queue = self.driver.queues[0]
        head = queue.offer(readable, writable, indirect=indirect)
        queue.kick()
        ((done, written),) = await queue.completed()
        assert done == head
        return self.memory.read(self.status, 1)[0], written

    async def read(self, sector: int, size_bytes: int) -> bytes:
        status, written = await self.request(T_IN, sector, in_bytes=size_bytes, indirect=True)
        assert (status, written) == (S_OK, size_bytes + 1)
        return self.memory.read(self.buffer, size_bytes)


@pytest.fixture(params=[False, True], ids=["plain", "converting"])
async def disk(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Disk]:
    path = tmp_path / "disk.raw"
    path.write_bytes(os.urandom(DISK_BYTES))
    with guest_memory(converts=request.param) as memory:
        async with driven(BlockDevice(RawDisk(path)), memory) as driver:
            driver.start()
            yield Disk(driver, memory, path)


async def test_what_is_written_is_read_back_and_is_in_the_file(disk: Disk) -> None:
    data = os.urandom(128 * KIB)
    assert await disk.request(T_OUT, 8, out=data) == (S_OK, 1)
    assert await disk.read(8, len(data)) == data
    assert await disk.request(T_FLUSH) == (S_OK, 1)
    assert disk.path.read_bytes()[8 * 512 :][: len(data)] == data
