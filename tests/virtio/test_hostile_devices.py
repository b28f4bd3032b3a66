"""Guests that keep to the rules of queues, and still want a device to hang, to hold too much, or to fill a log."""

from __future__ import annotations

import errno
import struct
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from kvmd.ranges import GpaRange
from kvmd.units import MIB, PAGE_SIZE
from kvmd.virtio import mmio
from kvmd.virtio.abi import DESC_INDIRECT, DESC_NEXT, DESC_WRITE, F_VERSION_1
from kvmd.virtio.balloon import BalloonDevice
from kvmd.virtio.block import BlockDevice
from kvmd.virtio.block_requests import ERRORS_LOGGED, S_IOERR, T_FLUSH, T_WRITE_ZEROES
from kvmd.virtio.console import F_MULTIPORT, ConsoleDevice
from kvmd.virtio.device import FAILURES_LOGGED
from kvmd.virtio.disk import RawDisk
from kvmd.virtio.host_port import HostPort
from kvmd.virtio.net import F_MAC, F_MRG_RXBUF, NetworkDevice
from tests.virtio.driver import WATCHDOG_SECONDS, Driver, DriverQueue, Memory, driven, guest_memory
from tests.virtio.test_block import Disk, Gate, offer_reads
from tests.virtio.test_hostile import DEVICES, TABLES, hostile, revived
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


def offer_in_parts(queue: DriverQueue, head: int, gpa: int, flags: int) -> None:
    """Offer ``PARTS`` bytes, each a part of its own, by an indirect table."""
    table = queue.memory.allocate(16 * PARTS)
    for at in range(PARTS):
        more = DESC_NEXT if at + 1 < PARTS else 0
        queue.memory.write(table + 16 * at, struct.pack("<QIHH", gpa + at, 1, flags | more, at + 1))
    queue.describe(head, table, 16 * PARTS, DESC_INDIRECT)
    queue.offer_head(head)


# -- network ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_header", [True, False], ids=["header", "bare"])
@pytest.mark.parametrize("merged", [True, False], ids=["merged", "single"])
@pytest.mark.parametrize("converts", [False, True], ids=["plain", "converting"])
async def test_receive_buffers_in_thousands_of_parts_cost_frames_and_not_the_link(
    *, converts: bool, merged: bool, has_header: bool
) -> None:
    """Each is as the standard wants it, with room for a header: what does not fit is dropped, as in a small ring."""
    ends = wire()
    header = bytes(12) if has_header else b""
    with guest_memory(converts=converts) as memory, ends.far:
        async with driven(model := NetworkDevice(ends, MAC, has_header=has_header), memory) as driver:
            driver.start(F_MAC | F_MRG_RXBUF if merged else F_MAC)
            net = Net(driver, memory, ends, model)
            queue = driver.queues[0]
            gpa = memory.allocate(32 * PARTS)
            for at in range(32):
                offer_in_parts(queue, at, gpa + at * PARTS, DESC_WRITE)
                net.buffers[at] = (gpa + at * PARTS, PARTS)
            queue.kick()
            await trio.testing.wait_all_tasks_blocked(0.001)
            ends.far.send(header + b"x" * 4096)
            ends.far.send(header + b"y" * 200)
            assert (await net.received())[12:] == b"y" * 200
            assert (model.dropped, model.link_up, driver.needs_reset) == (1, True, False)


@pytest.mark.parametrize("merged", [True, False], ids=["merged", "single"])
async def test_receive_buffers_that_turn_private_after_they_were_taken_are_not_touched(*, merged: bool) -> None:
    ends = wire()
    with guest_memory(converts=True) as memory, ends.far:
        async with driven(model := NetworkDevice(ends, MAC), memory) as driver:
            driver.start(F_MAC | F_MRG_RXBUF if merged else F_MAC)
            net = Net(driver, memory, ends, model)
            memory.allocate(0, PAGE_SIZE)
            gpa = memory.allocate(0)
            net.offer_buffers(40, PAGE_SIZE)
            ends.far.send(bytes(12) + b"before")
            assert (await net.received())[12:] == b"before"
            memory.turn_private(gpa + PAGE_SIZE)
            memory.write(gpa + PAGE_SIZE, CANARY)  # as if it were the private side: a device that touches it shows
            with capture_logs() as logs:
                ends.far.send(bytes(12) + b"after")
                await driver.failed()
            assert f"guest memory at {gpa + PAGE_SIZE:#x} is private" in logs[0]["reason"]
            assert memory.read(gpa + PAGE_SIZE, PAGE_SIZE) == CANARY
            await revived("net", driver, memory)


async def test_frames_in_parts_of_a_byte_leave_others_their_turns() -> None:
    ends, turns = wire(), Turns()
    with guest_memory() as memory, ends.far:
        async with driven(NetworkDevice(ends, MAC), memory, with_it=turns.take) as driver:
            driver.start()
            gpa = memory.allocate(PARTS)
            for at in range(64):
                offer_in_parts(driver.queues[1], at, gpa, 0)
            before = turns.count
            driver.queues[1].kick()
            await driver.queues[1].completed(64)
            assert turns.count - before > 30, "two frames a turn"


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


async def test_a_reset_while_the_balloon_is_inflated_ends_it() -> None:
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


STEPS = st.one_of(
    st.tuples(st.just("describe"), st.integers(0, 5), TABLES),
    st.tuples(st.just("offer"), st.integers(0, 5), st.integers(0, 8)),
    st.tuples(st.just("index"), st.integers(0, 5), st.integers(-9, 9)),
    st.tuples(st.just("content"), st.sampled_from([0x1000, 0x2000, 0x3000]), st.binary(max_size=64)),
    st.tuples(st.just("ready"), st.integers(0, 5), st.booleans()),
    st.tuples(st.just("status"), st.sampled_from([0, 1, 3, 4, 8, 11, 15, 64, 128]), st.none()),
    st.tuples(st.just("config"), st.integers(0, 70), st.binary(min_size=1, max_size=8)),
    st.tuples(st.just("start"), st.integers(0, (1 << 40) - 1), st.sampled_from([4, 8])),
    st.tuples(st.just("private"), st.integers(0, 8), st.none()),
    st.tuples(st.just("host"), st.integers(0, 3), st.none()),
    st.tuples(st.just("pause"), st.none(), st.none()),
    st.tuples(st.just("turns"), st.integers(1, 8), st.none()),
)


@pytest.mark.parametrize("kind", DEVICES)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEPS, max_size=40), converts=st.booleans())
def test_whatever_a_guest_does_in_whatever_order_a_reset_revives_the_device(
    kind: str,
    tmp_path: Path,
    steps: list[tuple[str, Any, Any]],
    converts: bool,  # noqa: FBT001 - hypothesis gives it
) -> None:
    """Also resets, queues taken down, pages turned private and pauses in the middle of requests."""

    async def play() -> None:
        with trio.fail_after(WATCHDOG_SECONDS), capture_logs() as logs:
            async with hostile(kind, tmp_path, converts=converts) as (driver, memory):
                memory.allocate(0x9000)
                driver.start(size=8)
                private: set[int] = set()
                for step in steps:
                    await take(step, driver, memory, private)
                await trio.testing.wait_all_tasks_blocked(0.001)
                for gpa in private:
                    assert memory.read(gpa, PAGE_SIZE) == CANARY
                await revived(kind, driver, memory)
        assert not [line for line in logs if line["log_level"] == "error"]

    trio.run(play)


CANARY = b"private!" * (PAGE_SIZE // 8)


async def take(  # noqa: C901, PLR0912 - one case a step
    step: tuple[str, Any, Any], driver: Driver, memory: Memory, private: set[int]
) -> None:
    """Do one thing that a guest, or its host, may do at any time."""

    def in_thread(offset: int, value: int) -> Awaitable[None]:
        return trio.to_thread.run_sync(driver.write, offset, value)

    match step:
        case "turns", count, _:
            for _ in range(count):
                await trio.lowlevel.checkpoint()
        case "content", gpa, data:
            if gpa not in private:
                memory.write(gpa, data)
        case "status", value, _:
            await in_thread(mmio.STATUS, value)
        case "config", offset, data:
            driver.transport.write(mmio.CONFIG + offset, data)
        case "start", features, size:
            # What a driver may accept: nothing else would get it far.
            await trio.to_thread.run_sync(lambda: begin(driver, features, size))
        case "private", page, _:
            gpa = (1 + page) * PAGE_SIZE
            if memory.accessor.converts and gpa not in private:
                memory.turn_private(gpa)
                memory.write(gpa, CANARY)  # as if it were the private side: a device that touches it shows
                private.add(gpa)
        case "host", what, _:
            host_does(driver, what)
        case "pause", _, _:
            await driver.device.pause()
            driver.device.resume()
        case "ready", index, ready:
            driver.write(mmio.QUEUE_SEL, index)
            await in_thread(mmio.QUEUE_READY, int(ready))
        case what, index, value if index in driver.queues:
            queue = driver.queues[index]
            if what == "describe":
                for at, (gpa, size_bytes, flags, following) in enumerate(value[: queue.size]):
                    queue.describe(at, gpa & (1 << 64) - 1, size_bytes, flags, following)
            elif what == "offer":
                queue.offer_head(value)
            else:
                queue.set_avail_index(queue.avail_index + value)
            queue.kick()
        case _:
            pass  # a queue that the device does not have


def begin(driver: Driver, features: int, size: int) -> None:
    driver.negotiate(features & driver.offered() | F_VERSION_1)
    for index in range(len(driver.device.model.queue_sizes)):
        driver.set_up_queue(index, size)
    driver.go()


def host_does(driver: Driver, what: int) -> None:
    """Do what comes from the host's side of a device."""
    match driver.device.model:
        case NetworkDevice() as network:
            network.set_link(up=bool(what % 2))
        case BalloonDevice() as balloon:
            balloon.set_target(what * PAGE_SIZE)
        case _:
            pass
