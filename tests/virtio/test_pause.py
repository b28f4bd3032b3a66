"""A paused machine's devices leave its memory as it is; what was asked for meanwhile is done afterwards."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from kvmd.virtio.block import BlockDevice
from kvmd.virtio.block_requests import T_IN
from kvmd.virtio.console import F_MULTIPORT, ConsoleDevice
from kvmd.virtio.disk import RawDisk
from kvmd.virtio.entropy import EntropyDevice
from kvmd.virtio.host_port import HostPort
from kvmd.virtio.net import NetworkDevice
from tests.virtio.driver import SIZE, WATCHDOG_SECONDS, Driver, Memory, driven, guest_memory
from tests.virtio.test_block import Disk, Gate, offer_reads
from tests.virtio.wire import MAC, wire


@pytest.fixture(params=[False, True], ids=["plain", "converting"])
def memory(request: pytest.FixtureRequest) -> Iterator[Memory]:
    with guest_memory(converts=request.param) as memory:
        yield memory


async def stays_as_it_is(driver: Driver, memory: Memory) -> None:
    """Ask the device for all that it could do, and see that none of it is done."""
    before = memory.read(0, SIZE)
    for queue in driver.queues.values():
        queue.kick()
    await trio.testing.wait_all_tasks_blocked()
    assert memory.read(0, SIZE) == before
    assert driver.interrupts() == 0


async def test_requests_of_a_pause_are_answered_after_it(memory: Memory) -> None:
    async with driven(EntropyDevice(), memory) as driver:
        driver.start()
        queue = driver.queues[0]
        gpa = memory.allocate(64)
        for _ in range(2):
            await driver.device.pause()
            queue.offer((), [(gpa, 64)])
            await stays_as_it_is(driver, memory)
            driver.device.resume()
            await queue.completed()


async def test_frames_of_a_pause_come_after_it(memory: Memory) -> None:
    ends = wire()
    with ends.far:
        async with driven(NetworkDevice(ends, MAC, mtu=1400), memory) as driver:
            driver.start()
            gpa = memory.allocate(4 * 65536)
            for at in range(4):
                driver.queues[0].offer((), [(gpa + at * 65536, 65536)])
            driver.queues[0].kick()
            ends.far.send(bytes(12) + b"first")
            await driver.queues[0].completed()
            # The device has taken buffers for the next frame already.
            await driver.device.pause()
            ends.far.send(bytes(12) + b"second")
            frame = memory.allocate(64)
            memory.write(frame, bytes(12) + b"out")
            driver.queues[1].offer([(frame, 15)])
            await stays_as_it_is(driver, memory)
            with pytest.raises(BlockingIOError):
                ends.far.recv(100)
            driver.device.resume()
            ((_, written),) = await driver.queues[0].completed()
            assert written == 18
            await driver.queues[1].completed()
            assert ends.far.recv(100)[12:] == b"out"


@pytest.mark.parametrize("threads", [1, 6], ids=["one", "more-than-workers"])
async def test_a_pause_waits_for_the_disk_and_begins_nothing_new(
    memory: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    (tmp_path / "disk.raw").write_bytes(os.urandom(1 << 20))
    gate = Gate(monkeypatch)
    async with driven(BlockDevice(RawDisk(tmp_path / "disk.raw")), memory) as driver:
        driver.start()
        disk = Disk(driver, memory, tmp_path / "disk.raw")
        offer_reads(disk, threads)
        await gate.wait(min(threads, 4))
        paused = trio.Event()

        async def pause() -> None:
            await driver.device.pause()
            paused.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(pause)
            await trio.testing.wait_all_tasks_blocked()
            assert not paused.is_set()
            gate.open.set()
            with trio.fail_after(WATCHDOG_SECONDS):
                await paused.wait()
        assert gate.done == threads
        await driver.queues[0].completed(threads)
        driver.interrupts()
        memory.write(disk.header, struct.pack("<IIQ", T_IN, 0, 8))
        driver.queues[0].offer([(disk.header, 16)], [(disk.buffer, 512), (disk.status, 1)])
        await stays_as_it_is(driver, memory)
        assert gate.done == threads
        driver.device.resume()
        await driver.queues[0].completed()


async def test_what_nobody_read_before_a_pause_is_given_back_after_it(memory: Memory) -> None:
    port = HostPort()
    async with driven(ConsoleDevice(port, "agent"), memory) as driver:
        driver.start(driver.offered() & ~F_MULTIPORT, queues=[0, 1])
        gpa = memory.allocate(64)
        memory.write(gpa, b"said before")
        with port.attach() as host:
            driver.queues[1].offer([(gpa, 11)])
            driver.queues[1].kick()
            await trio.testing.wait_all_tasks_blocked()
            await driver.device.pause()
            assert await host.receive() == b"said before"
            await stays_as_it_is(driver, memory)
            assert driver.queues[1].take_used() == []
            driver.device.resume()
            await driver.queues[1].completed()
