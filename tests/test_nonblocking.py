import array
import contextlib
import fcntl
import os
import pty
import stat
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from kvmd.errors import ConfigError
from kvmd.nonblocking import NonBlockingWriter, write_within


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    yield reading, writing
    for fd in (reading, writing):
        with contextlib.suppress(OSError):  # the test closed it
            os.close(fd)


async def test_all_of_it_is_written_while_a_reader_reads(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    data = b"".join(b"%05d\n" % number for number in range(5000))
    got = bytearray()

    async def read() -> None:
        while len(got) < len(data):
            await trio.lowlevel.wait_readable(reading)
            got.extend(os.read(reading, 777))

    with NonBlockingWriter.of_fd(writing) as writer:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await writer.write(data)
    assert bytes(got) == data


async def test_a_full_pipe_waits_and_holds_up_no_other_task(
    pipe: tuple[int, int],
    autojump_clock: MockClock,  # noqa: ARG001 - a clock that jumps
) -> None:
    reading, writing = pipe
    with NonBlockingWriter.of_fd(writing) as writer:
        with trio.move_on_after(5) as scope:
            await writer.write(b"x" * 99 + b"\n" + b"y" * 20_000)
        assert scope.cancelled_caught
    os.set_blocking(reading, False)
    assert os.read(reading, 8192)[:100] == b"x" * 99 + b"\n"


async def test_a_cancelled_write_to_a_pipe_ends_between_two_lines(
    pipe: tuple[int, int],
    autojump_clock: MockClock,  # noqa: ARG001 - a clock that jumps
) -> None:
    reading, writing = pipe
    with NonBlockingWriter.of_fd(writing) as writer, trio.move_on_after(5):
        await writer.write(b"".join(b"%0300d\n" % number for number in range(100)))
    got = os.read(reading, 8192)
    assert len(got) % 301 == 0
    assert got.endswith(b"\n")


async def test_writes_of_two_tasks_do_not_mix(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    got = bytearray()
    with NonBlockingWriter.of_fd(writing) as writer:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.write, b"a\n" * 8000)
            await wait_all_tasks_blocked()
            nursery.start_soon(writer.write, b"b\n" * 8000)
            while len(got) < 32_000:
                await trio.lowlevel.wait_readable(reading)
                got.extend(os.read(reading, 65536))
    assert bytes(got) == b"a\n" * 8000 + b"b\n" * 8000


async def test_a_reader_that_has_gone_is_a_broken_pipe(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    with NonBlockingWriter.of_fd(writing) as writer:
        os.close(reading)
        with pytest.raises(BrokenPipeError):
            await writer.write(b"x")


async def test_a_pipe_without_a_reader_from_the_start_is_one_too(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    os.close(reading)
    with NonBlockingWriter.of_fd(writing) as writer, pytest.raises(BrokenPipeError):
        await writer.write(b"x")


async def test_the_description_shared_with_the_shell_stays_blocking(pipe: tuple[int, int]) -> None:
    writing = pipe[1]
    with NonBlockingWriter.of_fd(writing) as writer:
        await writer.write(b"x")
        assert os.get_blocking(writing)
    os.write(writing, b"still open")


async def test_a_terminal_that_is_not_read_holds_up_nobody(
    autojump_clock: MockClock,  # noqa: ARG001 - a clock that jumps
) -> None:
    master, slave = pty.openpty()
    try:
        with NonBlockingWriter.of_fd(slave) as writer, trio.move_on_after(5) as scope:
            await writer.write(b"z" * 1_000_000)
        assert scope.cancelled_caught
        assert os.read(master, 10) == b"z" * 10
    finally:
        os.close(master)
        os.close(slave)


async def test_dev_null_takes_everything() -> None:
    fd = os.open("/dev/null", os.O_WRONLY)
    try:
        with NonBlockingWriter.of_fd(fd) as writer:
            await writer.write(b"x" * 1_000_000)
    finally:
        os.close(fd)


async def test_a_file_is_created_or_emptied(tmp_path: Path) -> None:
    path = tmp_path / "out"
    for text in (b"a longer first text", b"short"):
        with NonBlockingWriter.of_path(path) as writer:
            await writer.write(text)
            await writer.write(b"!")
        assert path.read_bytes() == text + b"!"


async def test_a_write_that_fails_half_way_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out"
    write = os.write
    room = [3]

    def write_until_full(fd: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(28, "No space left on device")
        written = write(fd, bytes(data)[: room[0]])
        room[0] -= written
        return written

    with NonBlockingWriter.of_path(path) as writer:
        await writer.write(b"whole\n")
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", write_until_full)
            with pytest.raises(OSError, match="No space"):
                await writer.write(b"never\n")
        await writer.write(b"again\n")
    assert path.read_bytes() == b"whole\nagain\n"


async def test_a_fifo_without_a_reader_can_be_opened_and_filled(
    tmp_path: Path,
    autojump_clock: MockClock,  # noqa: ARG001 - a clock that jumps
) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    with NonBlockingWriter.of_path(path) as writer:
        await writer.write(b"early\n")
        with trio.move_on_after(5) as scope:
            await writer.write(b"x" * (1 << 20))
        assert scope.cancelled_caught
        reading = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            assert os.read(reading, 6) == b"early\n"
        finally:
            os.close(reading)


async def test_a_fifo_survives_its_reader(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    with NonBlockingWriter.of_path(path) as writer:
        for text in (b"to the first\n", b"to the second\n"):
            reading = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            try:
                await writer.write(text)
                assert os.read(reading, 100) == text
            finally:
                os.close(reading)


async def test_a_fifo_whose_reader_came_first_does_not_end_for_it(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    got: list[bytes] = []
    async with trio.open_nursery() as nursery:

        async def read() -> None:
            got.append(await trio.to_thread.run_sync(path.read_bytes))

        nursery.start_soon(read)
        await wait_all_tasks_blocked()  # the thread is on its way into open()
        with NonBlockingWriter.of_path(path) as writer:
            await writer.write(b"first\n")
            await writer.write(b"second\n")
            # Closed before the thread has opened it, nobody would ever write: wait until it has read.
            with trio.fail_after(10):
                while _unread(writer):  # noqa: ASYNC110 - the kernel has no event for that
                    await trio.sleep(0.001)
    assert got == [b"first\nsecond\n"]


def _unread(writer: NonBlockingWriter) -> int:
    count = array.array("i", [0])
    fcntl.ioctl(writer._fd, termios.FIONREAD, count)
    return count[0]


@pytest.mark.parametrize(
    ("name", "reason"), [("", "Is a directory"), ("missing/out", "No such file"), ("socket", "nobody reads it")]
)
def test_what_cannot_be_written_is_said(tmp_path: Path, name: str, reason: str) -> None:
    os.mknod(tmp_path / "socket", stat.S_IFSOCK | 0o600)
    path = tmp_path / name
    with pytest.raises(ConfigError) as caught:
        NonBlockingWriter.of_path(path)
    assert str(path) in str(caught.value)
    assert reason in str(caught.value)


def test_closing_twice_is_harmless(tmp_path: Path) -> None:
    writer = NonBlockingWriter.of_path(tmp_path / "out")
    writer.close()
    writer.close()


def test_writing_without_an_event_loop_gives_up_in_time(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    os.set_blocking(writing, False)
    write_within(writing, b"x" * 100_000, 0.01)
    assert len(os.read(reading, 100_000)) == 4096
    os.close(reading)
    write_within(writing, b"nobody", 0.01)
