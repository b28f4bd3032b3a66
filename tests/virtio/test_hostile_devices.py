"""Guests that keep to the rules of queues, and still want a device to hang, to hold more than it may, or to fill a log."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path

import pytest
import trio
import trio.testing
from structlog.testing import capture_logs

from kvmd.ranges import GpaRange
from kvmd.units import MIB, PAGE_SIZE
from kvmd.virtio import mmio
from kvmd.virtio.abi import DESC_NEXT, DESC_WRITE, F_VERSION_1
from kvmd.virtio.balloon import BalloonDevice
from kvmd.virtio.block import BlockDevice
from kvmd.virtio.block_requests import ERRORS_LOGGED, S_IOERR, T_FLUSH, T_WRITE_ZEROES
from kvmd.virtio.console import F_MULTIPORT, ConsoleDevice
from kvmd.virtio.device import FAILURES_LOGGED
from kvmd.virtio.disk import RawDisk
from kvmd.virtio.host_port import HostPort
from kvmd.virtio.net import F_MAC, F_MRG_RXBUF, NetworkDevice
from tests.virtio.driver import WATCHDOG_SECONDS, driven, guest_memory
from tests.virtio.test_block import Disk, Gate, offer_reads
from tests.virtio.test_hostile import DEVICES, hostile, revived
from tests.virtio.test_net import Net
from tests.virtio.wire import MAC, wire

PARTS = 255


class Turns:
    """Counts how often another task of the event loop has its turn."""

    def __init__(self) -> None:
        self.count = 0

    async def take(self) -> None:
        while True:
            await trio.lowlevel.checkpoint()
            self.count += 1


# -- network ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_header", [True, False], ids=["header", "bare"])
@pytest.mark.parametrize("merged", [True, False], ids=["merged", "single"])
@pytest.mark.parametrize("converts", [False, True], ids=["plain", "converting"])
async def test_receive_buffers_in_thousands_of_parts_cost_frames_and_not_the_link(
    *, converts: bool, merged: bool, has_header: bool
) -> None:
    """Each buffer is as the standard wants it, with room for a header: what does not fit is dropped, as in a ring
    that is too small."""
    ends = wire()
    header = bytes(12) if has_header else b""
    with guest_memory(converts=converts) as memory, ends.far:
        async with driven(model := NetworkDevice(ends, MAC, has_header=has_header), memory) as driver:
            driver.start(F_MAC | F_MRG_RXBUF if merged else F_MAC)
            net = Net(driver, memory, ends, model)
            queue = driver.queues[0]
            gpa = memory.allocate(32 * PARTS)
            for at in range(32):
                parts = [(gpa + at * PARTS + byte, 1) for byte in range(PARTS)]
                table = memory.allocate(16 * PARTS)
                for index, (address, size) in enumerate(parts):
                    flags = DESC_WRITE | (DESC_NEXT if index + 1 < PARTS else 0)
                    memory.write(table + 16 * index, struct.pack("<QIHH", address, size, flags, index + 1))
                queue.describe(at, table, 16 * PARTS, 4)
                net.buffers[at] = (gpa + at * PARTS, PARTS)
                queue.offer_head(at)
            queue.kick()
            await trio.testing.wait_all_tasks_blocked(0.001)
            ends.far.send(header + b"x" * 4096)
            ends.far.send(header + b"y" * 200)
            assert (await net.received())[12:] == b"y" * 200
            assert (model.dropped, model.link_up, driver.needs_reset) == (1, True, False)


# -- block -----------------------------------------------------------------------------------------------------------


async def test_an_index_that_goes_back_under_requests_in_flight_fails_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the device would take 65535 requests out of a ring of 16, and remember each until it has been its turn."""
    (tmp_path / "disk.raw").write_bytes(bytes(MIB))
    gate = Gate(monkeypatch)
    with guest_memory() as memory:
        async with driven(BlockDevice(RawDisk(tmp_path / "disk.raw")), memory) as driver:
            driver.start(size=16)
            offer_reads(Disk(driver, memory, tmp_path / "disk.raw"), 3)
            await gate.wait(3)
            with capture_logs() as logs:
                driver.queues[0].set_avail_index(2)
                driver.queues[0].kick()
                await driver.failed()
            assert "the available index jumped to 2" in logs[0]["reason"]
            gate.open.set()
            await revived("block", driver, memory)


async def test_errors_of_a_disk_fill_no_log_however_often_the_device_is_reset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk.raw").write_bytes(bytes(MIB))

    def fail(_self: RawDisk) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(RawDisk, "flush", fail)
    with guest_memory() as memory, capture_logs() as logs:
        async with driven(BlockDevice(RawDisk(tmp_path / "disk.raw")), memory) as driver:
            for _ in range(ERRORS_LOGGED + 2):
                await trio.to_thread.run_sync(driver.start)
                header, status = memory.allocate(16), memory.allocate(1)
                memory.write(header, struct.pack("<IIQ", T_FLUSH, 0, 0))
                driver.queues[0].offer([(header, 16)], [(status, 1)])
                driver.queues[0].kick()
                await driver.queues[0].completed()
                assert memory.read(status, 1)[0] == S_IOERR
    assert len(logs) == ERRORS_LOGGED


async def test_zeros_that_nobody_waits_for_are_not_written_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk.raw").write_bytes(bytes(MIB))
    written: list[int] = []
    with guest_memory() as memory:
        async with driven(BlockDevice(RawDisk(tmp_path / "disk.raw")), memory) as driver:

            def zero(_self: RawDisk, offset: int, _size: int, *, unmap: bool, stable: bool) -> None:  # noqa: ARG001
                written.append(offset)
                driver.device.set_status(0)  # the guest resets the device meanwhile

            monkeypatch.setattr(RawDisk, "zero", zero)
            driver.start()
            header, status = memory.allocate(16 + 16 * 16), memory.allocate(1)
            ranges = b"".join(struct.pack("<QII", 8 * at, 8, 0) for at in range(16))
            memory.write(header, struct.pack("<IIQ", T_WRITE_ZEROES, 0, 0) + ranges)
            driver.queues[0].offer([(header, 16 + 16 * 16)], [(status, 1)])
            driver.queues[0].kick()
            with trio.fail_after(WATCHDOG_SECONDS):
                while driver.device.activation is not None or not written:
                    await trio.lowlevel.checkpoint()
            await revived("block", driver, memory)
    assert written == [0]


# -- console ---------------------------------------------------------------------------------------------------------


async def test_a_guest_that_reads_byte_by_byte_leaves_others_their_turns() -> None:
    port, turns = HostPort(), Turns()
    with guest_memory() as memory:
        async with driven(ConsoleDevice(port, "agent"), memory, with_it=turns.take) as driver:
            driver.start(driver.offered() & ~F_MULTIPORT, queues=[0, 1])
            gpa = memory.allocate(64)
            for at in range(64):
                driver.queues[0].offer((), [(gpa + at, 1)])
            with port.attach() as host:
                before = turns.count
                await host.send(bytes(range(64)))
                await driver.queues[0].completed(64)
            assert memory.read(gpa, 64) == bytes(range(64))
            assert turns.count - before >= 64


@pytest.mark.parametrize("event", range(9))
async def test_control_messages_for_ever_are_answered_a_bounded_number_of_times(event: int) -> None:
    with guest_memory() as memory:
        async with driven(ConsoleDevice(HostPort(), "agent"), memory) as driver:
            driver.start()
            gpa = memory.allocate(8)
            for port in (0, 1, 0xFFFFFFFF):
                for value in (1, 0, 0xFFFF) * 20:
                    memory.write(gpa, struct.pack("<IHH", port, event, value))
                    driver.queues[3].offer([(gpa, 8)])
                    driver.queues[3].kick()
                    await driver.queues[3].completed()
            answers = memory.allocate(64 * 64)
            for at in range(64):
                driver.queues[2].offer((), [(answers + 64 * at, 64)])
            driver.queues[2].kick()
            await trio.testing.wait_all_tasks_blocked(0.001)
            assert driver.queues[2].device_used_index <= 2
            assert not driver.needs_reset


async def test_gigabytes_for_nobody_leave_others_their_turns_and_end_with_a_reset() -> None:
    turns = Turns()
    with guest_memory() as memory:
        async with driven(ConsoleDevice(HostPort(), "agent"), memory, with_it=turns.take) as driver:
            driver.start()
            gpa = memory.allocate(8 * MIB)
            for at in range(30):
                driver.queues[5].offer([(gpa, 8 * MIB)] * 2)
                assert at or driver.queues[5].device_used_index == 0
            driver.queues[5].kick()
            with trio.fail_after(WATCHDOG_SECONDS):
                while turns.count < 100:
                    await trio.lowlevel.checkpoint()
            assert driver.queues[5].device_used_index < 30
            await revived("console", driver, memory)


# -- balloon ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("converts", [False, True], ids=["plain", "converting"])
async def test_a_balloon_of_the_rings_themselves_is_the_guests_own_loss(*, converts: bool) -> None:
    with guest_memory(converts=converts) as memory:
        async with driven(BalloonDevice(memory.accessor.discard), memory) as driver:
            driver.start()
            pages = memory.allocate(4 * 4096)
            numbers = struct.pack("<4096I", *range(4096))
            memory.write(pages, numbers)
            driver.queues[0].offer([(pages, len(numbers))])
            driver.queues[0].kick()
            await trio.testing.wait_all_tasks_blocked(0.01)
            driver.queues[0].kick()
            driver.queues[1].kick()
            await trio.testing.wait_all_tasks_blocked(0.01)
            await revived("balloon", driver, memory)


async def test_a_balloon_never_touches_private_pages_nor_what_is_no_memory() -> None:
    with guest_memory(converts=True) as memory:
        async with driven(model := BalloonDevice(memory.accessor.discard), memory) as driver:
            driver.start()
            numbers = memory.allocate(PAGE_SIZE)
            memory.turn_private(0x800000)
            # As if the private view were there: whoever discards or writes it shows.
            memory.write(0x800000, b"private!")
            memory.write(numbers, struct.pack("<4I", 0x800, 0x1000, 0xFFFFF, 0xFFFFFFFF))
            driver.queues[0].offer([(numbers, 16)])
            driver.queues[0].kick()
            await driver.queues[0].completed()
            for gpa in (0x800000, 0xFFF000, 0x1000000, (1 << 52) - 0x1000, (1 << 64) - 0x2000, (1 << 64) - 1):
                driver.queues[2].offer((), [(gpa, 0x1000)])
                driver.queues[2].kick()
                await driver.queues[2].completed()
            assert memory.read(0x800000, 8) == b"private!"
            assert model.discarded_bytes == PAGE_SIZE, "of the one page that is shared memory, reported as free"
            assert not driver.needs_reset


async def test_a_reset_while_the_balloon_is_inflated_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = trio.Event()
    token = trio.lowlevel.current_trio_token()
    discarded: list[GpaRange] = []
    with guest_memory() as memory:

        def discard(range_: GpaRange) -> int:
            if not discarded:
                token.run_sync_soon(begun.set)
            discarded.append(range_)
            return range_.size_bytes

        async with driven(BalloonDevice(discard), memory) as driver:
            driver.start()
            gpa = memory.allocate(4 * MIB)
            # Every second page, again and again: as many ranges as there can be of one buffer.
            memory.write(gpa, struct.pack("<1048576I", *range(0, 1 << 21, 2)))
            driver.queues[0].offer([(gpa, 4 * MIB)] * 100)
            driver.queues[0].kick()
            with trio.fail_after(WATCHDOG_SECONDS):
                await begun.wait()
            await revived("balloon", driver, memory)
            assert len(discarded) < 1 << 20


@pytest.mark.parametrize("size", [1, 2, 4, 8])
async def test_only_the_driver_s_own_field_of_the_balloon_can_be_written(size: int) -> None:
    with guest_memory() as memory:
        async with driven(model := BalloonDevice(memory.accessor.discard), memory) as driver:
            model.set_target(16 * PAGE_SIZE)
            driver.start()
            for offset in range(20):
                driver.transport.write(mmio.CONFIG + offset, b"\xff" * size)
            assert model.actual_bytes == (0xFFFFFFFF * PAGE_SIZE if size == 4 else 0)
            assert driver.config(0, 4) == struct.pack("<I", 16)
            assert driver.config(8, 8) == bytes(8)


# -- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DEVICES)
async def test_a_driver_that_is_refused_for_ever_does_not_fill_the_log(kind: str, tmp_path: Path) -> None:
    async with hostile(kind, tmp_path) as (driver, memory):
        with capture_logs() as logs:
            for _ in range(3 * FAILURES_LOGGED):
                assert not driver.negotiate(0)
        assert len(logs) == FAILURES_LOGGED
        assert "not logged" in logs[-1]["note"]
        assert driver.negotiate(F_VERSION_1)
        await revived(kind, driver, memory)


@pytest.mark.parametrize("kind", DEVICES)
async def test_a_queue_that_is_taken_down_under_a_request_and_set_up_anew_waits_for_a_reset(
    kind: str, tmp_path: Path
) -> None:
    async with hostile(kind, tmp_path) as (driver, memory):
        driver.start()
        for index, queue in driver.queues.items():
            queue.offer([(memory.allocate(64), 64)])
            queue.kick()
            driver.write(mmio.QUEUE_SEL, index)
            await trio.to_thread.run_sync(driver.write, mmio.QUEUE_READY, 0)
        for index, queue in driver.queues.items():
            driver.place_queue(index, queue.size, (queue.table, queue.avail, queue.used))
        await driver.failed()
        await revived(kind, driver, memory)
