import os
import threading
from collections.abc import Callable, Iterator

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from kvmd.console_pump import DRAIN_SECONDS, OutputPump
from kvmd.devices.console import ConsoleOutput
from kvmd.nonblocking import NonBlockingWriter


@pytest.fixture
def pipe() -> Iterator[list[int]]:
    fds = list(os.pipe())
    yield fds
    for fd in fds:
        os.close(fd)


def put(output: ConsoleOutput, data: bytes) -> None:
    for byte in data:
        output.put(byte)


def unexpected(error: OSError) -> None:
    pytest.fail(str(error))


async def read(fd: int, count: int) -> bytes:
    got = b""
    while len(got) < count:
        await trio.lowlevel.wait_readable(fd)
        got += os.read(fd, count - len(got))
    return got


async def test_bytes_go_out_as_they_come_and_the_rest_at_the_end(pipe: list[int]) -> None:
    output = ConsoleOutput()
    put(output, b"before ")
    with NonBlockingWriter.of_fd(pipe[1]) as writer:
        pump = OutputPump(output, writer, unexpected)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pump.run)
            assert await read(pipe[0], 7) == b"before "
            thread = threading.Thread(target=put, args=(output, b"while "))
            thread.start()
            assert await read(pipe[0], 6) == b"while "
            thread.join()
            put(output, b"end")
            pump.end()
    assert os.read(pipe[0], 100) == b"end"
    assert not pump.cut_short


async def test_a_vcpu_that_waits_for_room_gets_it_from_the_pump(pipe: list[int]) -> None:
    output = ConsoleOutput(capacity=10)
    with NonBlockingWriter.of_fd(pipe[1]) as writer:
        pump = OutputPump(output, writer, unexpected)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pump.run)
            thread = threading.Thread(target=put, args=(output, b"x" * 1000))
            thread.start()
            assert await read(pipe[0], 1000) == b"x" * 1000
            thread.join()
            pump.end()


async def test_the_end_waits_for_a_reader_but_not_for_ever(
    pipe: list[int],
    autojump_clock: MockClock,  # noqa: ARG001 - a clock that jumps
) -> None:
    output = ConsoleOutput(capacity=1 << 20)
    put(output, b"x" * 200_000)
    with NonBlockingWriter.of_fd(pipe[1]) as writer:
        pump = OutputPump(output, writer, unexpected)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pump.run)
            await trio.sleep(60)  # the pump waits for room meanwhile
            start = trio.current_time()
            pump.end()
    assert trio.current_time() - start == pytest.approx(DRAIN_SECONDS)
    assert pump.cut_short


async def test_a_reader_that_has_gone_is_said_once_and_output_is_dropped() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    output = ConsoleOutput(capacity=10)
    said: list[OSError] = []
    with NonBlockingWriter.of_fd(writing) as writer:
        pump = OutputPump(output, writer, said.append)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pump.run)
            await trio.to_thread.run_sync(put, output, b"x" * 1000)
            pump.end()
    os.close(writing)
    assert [type(error) for error in said] == [BrokenPipeError]
    assert output.take() == b""


async def test_a_disk_that_is_full_is_said_once_and_tried_again() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    output = ConsoleOutput()
    said: list[OSError] = []
    with NonBlockingWriter.of_fd(full) as writer:
        pump = OutputPump(output, writer, said.append)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pump.run)
            for _ in range(3):
                put(output, b"x")
                await wait_all_tasks_blocked()
            pump.end()
    os.close(full)
    assert [error.errno for error in said] == [28]


def test_a_vcpu_that_prints_after_the_event_loop_has_ended_comes_to_no_harm(pipe: list[int]) -> None:
    wakes: list[Callable[[], None]] = []

    class Watched(ConsoleOutput):
        def set_wake(self, wake: Callable[[], None]) -> None:
            wakes.append(wake)
            super().set_wake(wake)

    output = Watched()

    async def run() -> None:
        with NonBlockingWriter.of_fd(pipe[1]) as writer:
            pump = OutputPump(output, writer, unexpected)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pump.run)
                await wait_all_tasks_blocked()
                pump.end()

    trio.run(run)
    assert len(wakes) == 2
    for wake in wakes:
        wake()
    output.put(0x41)
    assert output.take() == b"A"
