"""Guests that break the rules, on every device: that device's failure with a reason, told once; a reset revives it."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from kvmd.units import MIB, PAGE_SIZE
from kvmd.virtio import mmio
from kvmd.virtio.abi import DESC_INDIRECT, DESC_NEXT, DESC_WRITE, F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1
from kvmd.virtio.balloon import BalloonDevice
from kvmd.virtio.block import BlockDevice
from kvmd.virtio.console import ConsoleDevice
from kvmd.virtio.device_model import DeviceModel
from kvmd.virtio.disk import RawDisk
from kvmd.virtio.entropy import EntropyDevice
from kvmd.virtio.host_port import HostPort
from kvmd.virtio.net import NetworkDevice
from tests.virtio.driver import SIZE, WATCHDOG_SECONDS, Driver, DriverQueue, Memory, driven, guest_memory
from tests.virtio.wire import MAC, wire

DEVICES = ["block", "net", "entropy", "console", "balloon"]
BUSY_QUEUE = {"block": 0, "net": 1, "entropy": 0, "console": 5, "balloon": 0}
"""A queue that each device serves without anything from outside."""


@asynccontextmanager
async def hostile(kind: str, folder: Path, *, converts: bool = False) -> AsyncIterator[tuple[Driver, Memory]]:
    """Yield a driver of one of the devices, not yet started."""
    with ExitStack() as stack:
        memory = stack.enter_context(guest_memory(converts=converts))
        model: DeviceModel
        match kind:
            case "block":
                path = folder / "disk.raw"
                path.write_bytes(bytes(MIB))
                model = BlockDevice(RawDisk(path))
            case "net":
                ends = wire()
                stack.enter_context(ends.far)
                model = NetworkDevice(ends, MAC)
            case "entropy":
                model = EntropyDevice()
            case "console":
                model = ConsoleDevice(HostPort(), "agent")
            case _:
                model = BalloonDevice(memory.accessor.discard)
        async with driven(model, memory) as driver:
            yield driver, memory


def valid(kind: str, queue: DriverQueue, memory: Memory) -> None:
    """Offer a request that the device's busy queue serves."""
    gpa = memory.allocate(64)
    match kind:
        case "block":
            memory.write(gpa, struct.pack("<IIQ", 0, 0, 0))
            queue.offer([(gpa, 16)], [(memory.allocate(513), 513)])
        case "entropy":
            queue.offer((), [(gpa, 64)])
        case _:
            queue.offer([(gpa, 64)])
    queue.kick()


async def revived(kind: str, driver: Driver, memory: Memory) -> None:
    # As a vCPU would, in a thread: a reset may wait for what the event loop has to finish.
    await trio.to_thread.run_sync(driver.start)
    queue = driver.queues[BUSY_QUEUE[kind]]
    valid(kind, queue, memory)
    await queue.completed()
    assert not driver.needs_reset


def one(gpa: int, size: int, flags: int = 0) -> Callable[[DriverQueue], None]:
    def offer(queue: DriverQueue) -> None:
        queue.describe(0, gpa, size, flags)
        queue.offer_head(0)

    return offer


def loop(queue: DriverQueue) -> None:
    for index in range(queue.size):
        queue.describe(index, 0x1000, 1, DESC_NEXT, (index + 1) % queue.size)
    queue.offer_head(0)


def wrong_order(queue: DriverQueue) -> None:
    queue.describe(0, 0x1000, 16, DESC_WRITE | DESC_NEXT, 1)
    queue.describe(1, 0x1000, 16)
    queue.offer_head(0)


def no_such_next(queue: DriverQueue) -> None:
    queue.describe(0, 0x1000, 1, DESC_NEXT, 0xFFFF)
    queue.offer_head(0)


MISDEEDS: dict[str, Callable[[DriverQueue], None]] = {
    "a loop": loop,
    "no bytes": one(0x1000, 0),
    "the wrong order": wrong_order,
    "an index too far": lambda queue: queue.set_avail_index(queue.size + 1),
    "no such head": lambda queue: queue.offer_head(queue.size),
    "no such next": no_such_next,
    "an indirect table outside memory": one(SIZE, 16, DESC_INDIRECT),
    "an indirect table at the end of all": one((1 << 64) - 16, 16, DESC_INDIRECT),
    "an endless indirect table": one(0x1000, 0xFFFFFFF0, DESC_INDIRECT),
}


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("misdeed", MISDEEDS)
async def test_a_broken_queue_fails_its_device_and_a_reset_revives_it(kind: str, misdeed: str, tmp_path: Path) -> None:
    async with hostile(kind, tmp_path) as (driver, memory):
        driver.start()
        queue = driver.queues[BUSY_QUEUE[kind]]
        with capture_logs() as logs:
            MISDEEDS[misdeed](queue)
            queue.kick()
            await driver.failed()
            await trio.testing.wait_all_tasks_blocked()
        assert [line["log_level"] for line in logs] == ["warning"]
        assert "\n" not in logs[0]["reason"]
        await revived(kind, driver, memory)


@pytest.mark.parametrize("kind", ["block", "net", "entropy", "console", "balloon"])
@pytest.mark.parametrize("gpa", [SIZE - 8, SIZE, 1 << 63, (1 << 64) - 1])
async def test_buffers_outside_memory(kind: str, gpa: int, tmp_path: Path) -> None:
    async with hostile(kind, tmp_path) as (driver, memory):
        driver.start()
        one(gpa, 16, DESC_WRITE if kind == "entropy" else 0)(driver.queues[BUSY_QUEUE[kind]])
        if kind == "block":
            driver.queues[0].describe(0, gpa, 16, DESC_NEXT, 1)
            driver.queues[0].describe(1, 0x1000, 1, DESC_WRITE)
        driver.queues[BUSY_QUEUE[kind]].kick()
        await driver.failed()
        await revived(kind, driver, memory)


@pytest.mark.parametrize("kind", DEVICES)
async def test_private_buffers(kind: str, tmp_path: Path) -> None:
    async with hostile(kind, tmp_path, converts=True) as (driver, memory):
        driver.start()
        gpa = memory.allocate(PAGE_SIZE, PAGE_SIZE)
        memory.allocate(0, PAGE_SIZE)
        memory.turn_private(gpa)
        queue = driver.queues[BUSY_QUEUE[kind]]
        if kind == "block":
            queue.describe(0, gpa, 16, DESC_NEXT, 1)
            queue.describe(1, 0x1000, 1, DESC_WRITE)
            queue.offer_head(0)
        else:
            one(gpa, 16, DESC_WRITE if kind == "entropy" else 0)(queue)
        queue.kick()
        with capture_logs() as logs:
            await driver.failed()
        assert f"guest memory at {gpa:#x} is private" in logs[0]["reason"]
        await revived(kind, driver, memory)


@pytest.mark.parametrize("part", ["table", "avail", "used"])
@pytest.mark.parametrize("where", ["outside", "private", "turned private"])
async def test_rings_that_devices_may_not_touch(part: str, where: str, tmp_path: Path) -> None:
    async with hostile("entropy", tmp_path, converts=True) as (driver, memory):
        assert driver.negotiate(F_VERSION_1)
        memory.allocate(0, PAGE_SIZE)
        queue = DriverQueue(driver, 0, 16)
        places = {name: memory.allocate(PAGE_SIZE, PAGE_SIZE) for name in ("table", "avail", "used")}
        if where == "outside":
            places[part] = SIZE - 16
        if where == "private":
            memory.turn_private(places[part])
        queue.table, queue.avail, queue.used = places["table"], places["avail"], places["used"]
        driver.place_queue(0, 16, (queue.table, queue.avail, queue.used))
        driver.queues[0] = queue
        driver.go()
        if where == "turned private":
            valid("entropy", queue, memory)
            await queue.completed()
            memory.turn_private(places[part])
            queue.kick()
        await driver.failed()
        await revived("entropy", driver, memory)


@pytest.mark.parametrize("kind", DEVICES)
async def test_a_device_without_the_queues_that_it_needs(kind: str, tmp_path: Path) -> None:
    async with hostile(kind, tmp_path) as (driver, memory):
        assert driver.negotiate(F_VERSION_1)
        with capture_logs() as logs:
            driver.go()
            await driver.failed()
        assert "was not set up before DRIVER_OK" in logs[0]["reason"]
        await revived(kind, driver, memory)


@pytest.mark.parametrize(
    ("kind", "readable", "writable", "reason"),
    [
        ("block", 15, 1, "a block request with 15 bytes of header and 1 parts to write"),
        ("block", 16, 0, "a block request with 16 bytes of header and 0 parts to write"),
        ("block", 0, 1, "a block request with 0 bytes of header and 1 parts to write"),
        ("net", 11, 0, "a frame of 11 bytes, without a whole header"),
        ("net", 0, 64, "a frame of 0 bytes, without a whole header"),
        ("entropy", 64, 0, "a request for random bytes without a buffer for them"),
    ],
)
async def test_buffers_that_are_too_short_or_the_wrong_way(
    kind: str, readable: int, writable: int, reason: str, tmp_path: Path
) -> None:
    async with hostile(kind, tmp_path) as (driver, memory):
        driver.start()
        queue = driver.queues[BUSY_QUEUE[kind]]
        gpa = memory.allocate(64)
        queue.offer([(gpa, readable)] if readable else [], [(gpa, writable)] if writable else [])
        with capture_logs() as logs:
            queue.kick()
            await driver.failed()
        assert logs[0]["reason"] == f"queue {queue.index}: {reason}"
        await revived(kind, driver, memory)


async def test_kvmd_s_own_fault_is_one_device_s_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with hostile("entropy", tmp_path) as (driver, memory):
        driver.start()
        with capture_logs() as logs, monkeypatch.context() as patch:
            patch.setattr("os.urandom", lambda _size: 1 / 0)
            valid("entropy", driver.queues[0], memory)
            await driver.failed()
        assert [line["log_level"] for line in logs] == ["error", "warning"]
        await revived("entropy", driver, memory)


# -- anything at all -------------------------------------------------------------------------------------------------

GPAS = st.one_of(
    st.sampled_from([0, 0x1000, 0x2000, SIZE - 16, SIZE, (1 << 64) - 8]),
    st.integers(0, 0x4000),
    st.integers(0, (1 << 64) - 1),
)
SIZES = st.one_of(st.sampled_from([0, 1, 12, 16, 512, 513, 4096, 1 << 20, 0xFFFFFFFF]), st.integers(0, 600))
TABLES = st.lists(st.tuples(GPAS, SIZES, st.sampled_from([0, 1, 2, 3, 4, 5, 7]), st.integers(0, 8)), max_size=8)


@pytest.mark.parametrize("kind", DEVICES)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    table=TABLES,
    inner=TABLES,
    content=st.binary(max_size=64),
    heads=st.lists(st.integers(0, 8), max_size=10),
    index=st.one_of(st.none(), st.integers(0, 0xFFFF)),
    ring_features=st.sampled_from([0, F_INDIRECT_DESC, F_EVENT_IDX, F_INDIRECT_DESC | F_EVENT_IDX]),
    converts=st.booleans(),
)
def test_any_queue_is_served_or_fails_its_device(
    kind: str,
    tmp_path: Path,
    table: list[tuple[int, int, int, int]],
    inner: list[tuple[int, int, int, int]],
    content: bytes,
    heads: list[int],
    index: int | None,
    ring_features: int,
    converts: bool,  # noqa: FBT001 - hypothesis gives it
) -> None:
    async def play() -> None:
        with trio.fail_after(WATCHDOG_SECONDS), capture_logs():
            async with hostile(kind, tmp_path, converts=converts) as (driver, memory):
                memory.allocate(0x8000)
                driver.start(size=8, ring_features=ring_features)
                memory.write(0x1000, b"".join(struct.pack("<QIHH", *descriptor) for descriptor in inner))
                memory.write(0x2000, content)
                for queue in driver.queues.values():
                    for at, (gpa, size, flags, following) in enumerate(table):
                        queue.describe(at, gpa & (1 << 64) - 1, size, flags, following)
                    for head in heads:
                        queue.offer_head(head)
                    if index is not None:
                        queue.set_avail_index(index)
                    queue.kick()
                await trio.testing.wait_all_tasks_blocked(0.001)
                await revived(kind, driver, memory)

    trio.run(play)


async def test_a_device_whose_queue_was_taken_down_rests_until_a_reset(tmp_path: Path) -> None:
    async with hostile("entropy", tmp_path) as (driver, memory):
        driver.start()
        queue = driver.queues[0]
        driver.write(mmio.QUEUE_SEL, 0)
        driver.write(mmio.QUEUE_READY, 0)
        valid("entropy", queue, memory)
        await trio.testing.wait_all_tasks_blocked(0.001)
        assert queue.device_used_index == 0
        assert not driver.needs_reset
        await revived("entropy", driver, memory)
