from __future__ import annotations

import os
import struct
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
import trio
from structlog.testing import capture_logs

from kvmd.errors import ConfigError
from kvmd.units import KIB, MIB
from kvmd.virtio import device as device_module
from kvmd.virtio.abi import F_INDIRECT_DESC, F_VERSION_1, Status
from kvmd.virtio.block import F_FLUSH, F_RO, BlockDevice
from kvmd.virtio.block_requests import (
    S_IOERR,
    S_OK,
    S_UNSUPP,
    T_DISCARD,
    T_FLUSH,
    T_GET_ID,
    T_IN,
    T_OUT,
    T_WRITE_ZEROES,
)
from kvmd.virtio.disk import RawDisk
from tests.virtio.driver import WATCHDOG_SECONDS, Driver, Memory, driven, guest_memory

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


async def test_reads_by_a_worker_are_the_same(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RawDisk, "read_now", lambda *_: False)
    content = disk.path.read_bytes()
    for sector, size in ((0, 512), (7, 64 * KIB), (DISK_BYTES // 512 - 1, 512), (0, 1536 * KIB)):
        assert await disk.read(sector, size) == content[sector * 512 :][:size]


async def test_the_configuration_says_what_the_disk_is(disk: Disk) -> None:
    capacity, size_max, seg_max = struct.unpack("<QII", disk.driver.config(0, 16))
    assert capacity == DISK_BYTES // 512
    assert (size_max, seg_max) == (MIB, 254)
    assert struct.unpack("<I", disk.driver.config(20, 4)) == (512,)
    assert struct.unpack("<BB", disk.driver.config(24, 2)) == (3, 0), "8 blocks of 512 bytes are a page"
    assert not disk.driver.offered() & F_RO


async def test_a_request_in_many_small_parts(disk: Disk) -> None:
    data = os.urandom(3 * 512)
    memory = disk.memory
    memory.write(disk.header, struct.pack("<IIQ", T_OUT, 0, 3))
    memory.write(disk.buffer, data)
    at = disk.buffer
    parts = [(disk.header, 3), (disk.header + 3, 13), (at, 1), (at + 1, 1030), (at + 1031, 505)]
    queue = disk.driver.queues[0]
    queue.offer(parts, [(disk.status, 1)])
    queue.kick()
    assert (await queue.completed())[0][1] == 1
    assert disk.path.read_bytes()[3 * 512 :][: len(data)] == data
    # The header may run on into the data, and the data into the status.
    memory.write(disk.buffer, struct.pack("<IIQ", T_OUT, 0, 9) + data)
    queue.offer([(disk.buffer, 16 + len(data))], [(disk.status, 1)])
    queue.kick()
    await queue.completed()
    assert disk.path.read_bytes()[9 * 512 :][: len(data)] == data
    memory.write(disk.header, struct.pack("<IIQ", T_IN, 0, 9))
    queue.offer([(disk.header, 16)], [(disk.buffer, 100), (disk.buffer + 100, len(data) - 100 + 1)])
    queue.kick()
    assert (await queue.completed())[0][1] == len(data) + 1
    assert memory.read(disk.buffer, len(data) + 1) == data + b"\0"


async def test_the_serial_number(disk: Disk) -> None:
    assert await disk.request(T_GET_ID, in_bytes=20) == (S_OK, 21)
    serial = disk.memory.read(disk.buffer, 20)
    assert len(serial.strip(b"\0")) == 20
    assert await disk.request(T_GET_ID, in_bytes=19) == (S_IOERR, 20)


async def test_discard_and_zeros(disk: Disk) -> None:
    content = disk.path.read_bytes()
    assert await disk.request(T_DISCARD, out=struct.pack("<QIIQII", 8, 8, 0, 64, 8, 0)) == (S_OK, 1)
    assert await disk.request(T_WRITE_ZEROES, out=struct.pack("<QII", 24, 8, 0)) == (S_OK, 1)
    assert await disk.request(T_WRITE_ZEROES, out=struct.pack("<QII", 40, 8, 1)) == (S_OK, 1)
    now = disk.path.read_bytes()
    for sector in range(0, 80, 8):
        piece = slice(sector * 512, (sector + 8) * 512)
        assert now[piece] == (bytes(4096) if sector in (8, 24, 40, 64) else content[piece])


@pytest.mark.parametrize(
    ("kind", "sector", "out", "in_bytes", "status"),
    [
        (T_IN, DISK_BYTES // 512, b"", 512, S_IOERR),
        (T_IN, DISK_BYTES // 512 - 1, b"", 1024, S_IOERR),
        (T_IN, (1 << 64) - 1, b"", 512, S_IOERR),
        (T_IN, 0, b"", 513, S_IOERR),
        (T_OUT, DISK_BYTES // 512, bytes(512), 0, S_IOERR),
        (T_OUT, 0, bytes(511), 0, S_IOERR),
        (T_DISCARD, 0, b"", 0, S_IOERR),
        (T_DISCARD, 0, bytes(15), 0, S_IOERR),
        (T_DISCARD, 0, bytes(17 * 16), 0, S_IOERR),
        (T_DISCARD, 0, struct.pack("<QII", 0, 1, 1), 0, S_UNSUPP),
        (T_DISCARD, 0, struct.pack("<QII", 0, (1 << 21) + 1, 0), 0, S_IOERR),
        (T_DISCARD, 0, struct.pack("<QII", (1 << 64) - 1, 1, 0), 0, S_IOERR),
        (T_WRITE_ZEROES, 0, struct.pack("<QII", 0, 1, 2), 0, S_UNSUPP),
        (T_WRITE_ZEROES, 0, struct.pack("<QII", DISK_BYTES // 512, 1, 0), 0, S_IOERR),
        (2, 0, b"", 0, S_UNSUPP),
        (0xFFFFFFFF, 0, b"", 512, S_UNSUPP),
    ],
)
async def test_requests_that_cannot_be_are_refused_one_by_one(
    disk: Disk, kind: int, sector: int, out: bytes, in_bytes: int, status: int
) -> None:
    content = disk.path.read_bytes()
    assert await disk.request(kind, sector, out=out, in_bytes=in_bytes) == (status, 1)
    assert await disk.read(0, 512) == content[:512], "the next one is served"
    assert disk.path.read_bytes() == content


async def test_a_request_larger_than_any_is_refused(disk: Disk) -> None:
    disk.memory.write(disk.header, struct.pack("<IIQ", T_IN, 0, 0))
    table = [(disk.buffer, 2 * MIB)] * 64
    queue = disk.driver.queues[0]
    queue.offer([(disk.header, 16)], [*table, (disk.status, 1)], indirect=True)
    queue.kick()
    await queue.completed()
    assert disk.memory.read(disk.status, 1) == bytes([S_IOERR])


async def test_an_error_of_the_file_is_the_request_s(disk: Disk) -> None:
    os.truncate(disk.path, MIB)
    with capture_logs() as logs:
        assert await disk.request(T_IN, MIB // 512, in_bytes=4096) == (S_IOERR, 1)
    assert [line["event"] for line in logs] == ["disk error"]
    os.truncate(disk.path, DISK_BYTES)
    assert await disk.read(MIB // 512, 4096) == bytes(4096)


async def test_a_read_only_disk_is_never_written(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(MIB))
    with guest_memory() as memory:
        async with driven(BlockDevice(RawDisk(path, read_only=True)), memory) as driver:
            assert driver.offered() & F_RO
            # Also for a driver that does not want to know.
            driver.start(F_FLUSH)
            disk = Disk(driver, memory, path)
            assert await disk.request(T_OUT, out=b"x" * 512) == (S_IOERR, 1)
            assert await disk.request(T_DISCARD, out=struct.pack("<QII", 0, 1, 0)) == (S_UNSUPP, 1)
            assert await disk.request(T_FLUSH) == (S_OK, 1)
            assert await disk.read(0, 512) == bytes(512)


async def test_without_flushes_each_write_is_stable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(MIB))
    seen: list[bool] = []
    real = RawDisk.write

    def write(self: RawDisk, views: Sequence[memoryview | bytes], offset: int, *, aligned: bool, stable: bool) -> None:
        seen.append(stable)
        real(self, views, offset, aligned=aligned, stable=stable)

    monkeypatch.setattr(RawDisk, "write", write)
    with guest_memory() as memory:
        async with driven(BlockDevice(RawDisk(path)), memory) as driver:
            for features in (0, F_FLUSH):
                driver.start(features)
                assert await Disk(driver, memory, path).request(T_OUT, out=b"x" * 512) == (S_OK, 1)
    assert seen == [True, False]


@pytest.mark.parametrize("converts", [False, True])
async def test_direct_io_for_what_is_aligned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, converts: bool
) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(MIB))
    try:
        raw = RawDisk(path, direct=True)
    except ConfigError as error:
        pytest.skip(str(error))
    used: list[bool] = []
    real = RawDisk.read

    def read(self: RawDisk, views: Sequence[memoryview], offset: int, *, aligned: bool) -> None:
        used.append(aligned)
        real(self, views, offset, aligned=aligned)

    monkeypatch.setattr(RawDisk, "read", read)
    with guest_memory(converts=converts) as memory:
        async with driven(BlockDevice(raw), memory) as driver:
            driver.start()
            disk = Disk(driver, memory, path)
            data = os.urandom(128 * KIB)
            assert await disk.request(T_OUT, 8, out=data) == (S_OK, 1)
            assert await disk.read(8, len(data)) == data
            disk.buffer += 8  # no longer aligned, unless it goes through a buffer of ours
            assert await disk.read(8, len(data)) == data
    assert used == [True, converts]


class Gate:
    """Holds up reads of the disk in their worker threads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered = threading.Semaphore(0)
        self.open = threading.Event()
        self.done = 0
        real = RawDisk.read

        def read(disk: RawDisk, views: Sequence[memoryview], offset: int, *, aligned: bool = False) -> None:
            self.entered.release()
            assert self.open.wait(WATCHDOG_SECONDS)
            real(disk, views, offset, aligned=aligned)
            self.done += 1

        monkeypatch.setattr(RawDisk, "read", read)
        monkeypatch.setattr(RawDisk, "read_now", lambda *_: False)

    async def wait(self, count: int = 1) -> None:
        for _ in range(count):
            assert await trio.to_thread.run_sync(self.entered.acquire, True, WATCHDOG_SECONDS)  # noqa: FBT003 - run_sync has no names


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def offer_reads(disk: Disk, count: int) -> None:
    disk.memory.write(disk.header, struct.pack("<IIQ", T_IN, 0, 0))
    for at in range(count):
        disk.driver.queues[0].offer([(disk.header, 16)], [(disk.buffer + 4096 * at, 4096), (disk.status, 1)])
    disk.driver.queues[0].kick()


async def test_several_requests_are_in_flight_and_others_wait(disk: Disk, gate: Gate) -> None:
    offer_reads(disk, 20)
    await gate.wait(4)
    assert not gate.entered.acquire(blocking=False)
    assert disk.driver.queues[0].device_used_index == 0
    gate.open.set()
    assert len(await disk.driver.queues[0].completed(20)) == 20
    assert gate.done == 20


async def test_a_reset_waits_for_io_into_memory_and_the_rest_is_dropped(disk: Disk, gate: Gate) -> None:
    offer_reads(disk, 20)
    await gate.wait(4)
    driver, straight = disk.driver, not disk.memory.accessor.converts
    over = threading.Event()

    def reset() -> None:  # a vCPU's thread
        driver.status  # noqa: B018 - a register is read while it is being reset
        driver.transport.write(0x70, bytes(4))
        over.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, reset)
        with trio.fail_after(WATCHDOG_SECONDS):
            while driver.device.activation is not None:
                await trio.lowlevel.checkpoint()
        if straight:
            assert not over.is_set(), "the memory is not the guest's before its I/O is over"
            assert driver.status != 0
        else:
            with trio.fail_after(WATCHDOG_SECONDS):
                while not over.is_set():
                    await trio.lowlevel.checkpoint()
            assert driver.status == 0, "what is copied under the lock is copied no more"
            disk.memory.write(disk.buffer, b"mine again" * 100)
        gate.open.set()
    assert driver.status == 0
    assert driver.queues[0].device_used_index == 0
    driver.start()
    if not straight:
        assert disk.memory.read(disk.buffer, 1000) == b"mine again" * 100
    assert await disk.read(0, 4096) == disk.path.read_bytes()[:4096]
    assert gate.done == 5, "what waited was not even begun"


async def test_a_reset_that_io_holds_up_ends_all_the_same(
    disk: Disk, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_module, "RESET_SECONDS", 0.01)
    offer_reads(disk, 1)
    await gate.wait()
    driver = disk.driver
    driver.write(0x70, 0)
    if not disk.memory.accessor.converts:
        assert driver.status == Status.NEEDS_RESET, "not yet 0: the driver has to wait"
        driver.write(0x70, Status.ACKNOWLEDGE)
        assert driver.status == Status.NEEDS_RESET
    gate.open.set()
    with trio.fail_after(WATCHDOG_SECONDS):
        while driver.status:
            await trio.lowlevel.checkpoint()
    driver.start()
    assert await disk.read(0, 512) == disk.path.read_bytes()[:512]


async def test_a_device_is_served_anew_when_the_old_io_is_over(disk: Disk, gate: Gate) -> None:
    if not disk.memory.accessor.converts:
        pytest.skip("there the reset itself waits")
    offer_reads(disk, 1)
    await gate.wait()
    disk.driver.write(0x70, 0)
    disk.driver.start()
    offer_reads(disk, 1)
    await trio.testing.wait_all_tasks_blocked()
    assert disk.driver.queues[0].device_used_index == 0
    assert not gate.entered.acquire(blocking=False)
    gate.open.set()
    await disk.driver.queues[0].completed()
    assert gate.done == 2


@pytest.mark.parametrize("converts", [False, True])
async def test_closing_with_io_in_flight_leaves_nothing(tmp_path: Path, gate: Gate, *, converts: bool) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(MIB))

    async def open_at_the_end() -> None:
        try:
            await trio.sleep_forever()
        finally:
            gate.open.set()

    with guest_memory(converts=converts) as memory:
        async with driven(BlockDevice(RawDisk(path)), memory, with_it=open_at_the_end) as driver:
            driver.start()
            offer_reads(Disk(driver, memory, path), 6)
            await gate.wait(4)
    assert gate.done == 4
    with RawDisk(path):
        pass  # unlocked


async def test_pages_that_turn_private_under_io_are_not_touched(disk: Disk, gate: Gate) -> None:
    if not disk.memory.accessor.converts:
        pytest.skip("nothing converts")
    offer_reads(disk, 1)
    await gate.wait()
    with capture_logs() as logs:
        disk.memory.turn_private(disk.buffer)
        gate.open.set()
        await disk.driver.failed()
    assert [line["reason"] for line in logs] == [
        f"queue 0: guest memory at {disk.buffer:#x} is private: only the guest may see it"
    ]
    assert disk.memory.read(disk.buffer, 4096) == bytes(4096)


async def test_requests_without_indirect_descriptors_or_event_indices(disk: Disk) -> None:
    for ring_features in (0, F_INDIRECT_DESC):
        disk.driver.start(F_VERSION_1, size=4, ring_features=ring_features)
        for _ in range(10):
            assert await disk.request(T_OUT, 1, out=b"y" * 512) == (S_OK, 1)
