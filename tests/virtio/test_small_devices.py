from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
import trio

from kvmd.ranges import GpaRange
from kvmd.units import PAGE_SIZE
from kvmd.virtio.balloon import BalloonDevice
from kvmd.virtio.entropy import ANSWER_BYTES, EntropyDevice
from tests.virtio.driver import Memory, driven, guest_memory


@pytest.fixture(params=[False, True], ids=["plain", "converting"])
def memory(request: pytest.FixtureRequest) -> Iterator[Memory]:
    with guest_memory(converts=request.param) as memory:
        yield memory


async def test_entropy_fills_what_is_asked_for_and_no_more_than_a_page(memory: Memory) -> None:
    async with driven(EntropyDevice(), memory) as driver:
        driver.start()
        queue = driver.queues[0]
        gpa = memory.allocate(1 << 20)
        for asked, parts in ((64, 1), (100, 3), (1 << 20, 1)):
            memory.write(gpa, bytes(asked))
            step = -(-asked // parts)
            queue.offer((), [(gpa + at, min(step, asked - at)) for at in range(0, asked, step)])
            queue.kick()
            ((_, written),) = await queue.completed()
            assert written == min(asked, ANSWER_BYTES)
            data = memory.read(gpa, asked)
            assert len(set(data[:written])) > 20
            assert data[written:] == bytes(asked - written)


async def test_balloon_gives_inflated_and_reported_pages_back(memory: Memory) -> None:
    discarded: list[GpaRange] = []

    def discard(range_: GpaRange) -> int:
        discarded.append(range_)
        return memory.accessor.discard(range_)

    async with driven(model := BalloonDevice(discard), memory) as driver:
        driver.start()
        assert memory.allocate(0, PAGE_SIZE) < 0x80 * PAGE_SIZE, "pages from 0x80 on are free"
        for page in range(0x80, 0x90):
            memory.write(page * PAGE_SIZE, b"x" * PAGE_SIZE)
        numbers = memory.allocate(64)
        memory.write(numbers, struct.pack("<5I", 0x83, 0x81, 0x82, 0x88, 0x9000_0000))
        driver.queues[0].offer([(numbers, 20)])
        driver.queues[0].kick()
        await driver.queues[0].completed()
        assert discarded == [
            GpaRange(0x81000, 0x84000),
            GpaRange(0x88000, 0x89000),
            GpaRange(0x900_0000_0000, 0x900_0000_1000),
        ], "the last is no memory, but that is for the callback to say"
        assert model.discarded_bytes == 4 * PAGE_SIZE
        assert memory.read(0x81000, PAGE_SIZE) == bytes(PAGE_SIZE)
        assert memory.read(0x84000, 1) == b"x"

        for index in (2, 4):  # Linux's number of the reporting queue, and the standard's
            discarded.clear()
            driver.queues[index].offer((), [(0x84800, 0x2000), (0x8A000, 0x3000)])
            driver.queues[index].kick()
            await driver.queues[index].completed()
            assert [str(range_) for range_ in discarded] == ["[0x85000, 0x86000)", "[0x8a000, 0x8d000)"]

        driver.queues[1].offer([(numbers, 20)])
        driver.queues[1].kick()
        await driver.queues[1].completed()
        assert len(discarded) == 2

        model.set_target(64 * PAGE_SIZE)
        with trio.fail_after(20):
            while await driver.interrupted() != 2:
                pass
        assert driver.config(0, 8) == struct.pack("<II", 64, 0)
        driver.transport.write(0x104, struct.pack("<I", 60))
        assert model.actual_bytes == 60 * PAGE_SIZE
        assert driver.config(0, 8) == struct.pack("<II", 64, 60)
