"""Writing to files that other programs read, without ever holding up the event loop.

A pipe, a FIFO or a terminal whose reader is slow blocks a plain write for as long as the reader likes. The flag
O_NONBLOCK belongs to the open file description, which kvmd may share with the shell that started it, so it must
not be set there: kvmd opens a description of its own through /proc (proc(5), /proc/pid/fd). Where that is not
allowed, each write waits until the file is writable and is no longer than PIPE_BUF, which a pipe then has room for
(pipe(7)).
"""

from __future__ import annotations

import errno
import os
import select
import stat
import time
from pathlib import Path

import trio

from kvmd.closing import Closing
from kvmd.errors import ConfigError

_CHUNK = select.PIPE_BUF
"""Bytes of one write to a pipe, at most: such a write is atomic, so whole lines stay whole."""


class NonBlockingWriter(Closing):
    """A file that is written from the event loop: made by ``of_fd`` or ``of_path``.

    One task at a time writes; others queue, so that what one call of ``write`` was given stays together.
    """

    def __init__(self, fd: int, *, truncates: bool = False) -> None:
        """Take over ``fd``; ``truncates``: a write that fails half-way is undone (a regular file of our own)."""
        self._fd = fd
        self._truncates = truncates
        self._polled = _can_be_polled(fd)
        self._turn = trio.StrictFIFOLock()

    @classmethod
    def of_fd(cls, fd: int) -> NonBlockingWriter:
        """Return a writer to what ``fd`` is open on; ``fd`` itself is left alone.

        Raises:
            OSError: ``fd`` is not open.
        """
        kind = os.fstat(fd).st_mode
        if stat.S_ISFIFO(kind) or stat.S_ISCHR(kind):
            flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            try:
                return cls(os.open(f"/proc/self/fd/{fd}", flags))
            except OSError:
                pass  # a terminal of another user, or no /proc: each write waits for room instead
        return cls(os.dup(fd))

    @classmethod
    def of_path(cls, path: Path) -> NonBlockingWriter:
        """Open ``path`` for writing; a regular file is created, or emptied.

        A FIFO is opened for reading too, as fifo(7) says Linux allows, so that neither opening it waits for a
        reader nor a reader that leaves ends it: the next one goes on where the FIFO is.

        Raises:
            ConfigError: it cannot be written.
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        try:
            try:
                fd = os.open(path, flags, 0o666)
            except OSError as error:
                if error.errno != errno.ENXIO:  # a FIFO that nobody reads
                    raise
                return cls(_open_fifo(path))
            kind = os.fstat(fd).st_mode
            if stat.S_ISFIFO(kind):
                try:
                    return cls(_open_fifo(path))
                finally:
                    # Only now: a FIFO that had a writer and has none is at its end for whoever reads it.
                    os.close(fd)
            if stat.S_ISREG(kind):
                os.ftruncate(fd, 0)
        except OSError as error:
            reason = "nobody reads it" if error.errno == errno.ENXIO else error.strerror
            raise ConfigError(f"cannot write to {path}: {reason}: choose a file that can be written") from error
        return cls(fd, truncates=stat.S_ISREG(kind))

    async def write(self, data: bytes) -> None:
        """Write all of ``data``, waiting for room as long as it takes.

        A cancelled write to a pipe ends between two lines.

        Raises:
            OSError: it cannot be written: ``BrokenPipeError`` where the reader has gone.
        """
        async with self._turn:
            start = os.lseek(self._fd, 0, os.SEEK_CUR) if self._truncates else 0
            try:
                await self._write(memoryview(data))
            except OSError:
                if self._truncates:
                    os.ftruncate(self._fd, start)
                    os.lseek(self._fd, start, os.SEEK_SET)
                raise

    def close(self) -> None:
        """Close, when no task writes any more; harmless the second time."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    async def _write(self, rest: memoryview) -> None:
        while rest:
            if self._polled:
                await trio.lowlevel.wait_writable(self._fd)
                chunk = _whole_lines(rest[:_CHUNK])
            else:
                await trio.lowlevel.checkpoint()
                chunk = rest
            try:
                written = os.write(self._fd, chunk)
            except BlockingIOError:  # someone else took the room
                continue
            rest = rest[written:]


def _open_fifo(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except PermissionError:  # may be written but not read
        return os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)


def _can_be_polled(fd: int) -> bool:
    """Tell whether epoll takes ``fd``: it refuses regular files and such devices as /dev/null."""
    with select.epoll() as epoll:
        try:
            epoll.register(fd, 0)
        except PermissionError:
            return False
    return True


def _whole_lines(chunk: memoryview) -> memoryview:
    """Return the whole lines that ``chunk`` starts with, or all of it where there is none."""
    return chunk[: bytes(chunk).rfind(b"\n") + 1] or chunk


def write_within(fd: int, data: bytes, seconds: float) -> None:
    """Write ``data`` without an event loop, for at most about ``seconds``; what cannot be written is dropped."""
    deadline = time.monotonic() + seconds
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    rest = memoryview(data)
    while rest and poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        try:
            rest = rest[os.write(fd, rest[:_CHUNK]) :]
        except BlockingIOError:
            continue
        except OSError:
            return
