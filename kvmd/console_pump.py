"""From a buffer that threads fill to a file that someone may be slow to read: one task of the event loop."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable
from typing import Protocol

import trio

DRAIN_SECONDS = 2.0
"""How long the end of a machine waits for its output to be read."""

GATHER_SECONDS = 0.01
"""How long bytes gather after a write: waking the event loop for each byte costs a guest ten times the byte."""

_GONE = {errno.EPIPE, errno.EIO}
"""What a write says when nobody will ever read again: a closed pipe, a terminal that hung up."""


class Buffer(Protocol):
    """What a pump empties: thread-safe; ``kvmd.devices.console.ConsoleOutput`` is one."""

    def take(self) -> bytes:
        """Return all that waits, perhaps nothing. Never blocks."""

    def set_wake(self, wake: Callable[[], None]) -> None:
        """Call ``wake``, from any thread, when there is something again, and at once where there is."""


class Sink(Protocol):
    """Where a pump writes: ``kvmd.nonblocking.NonBlockingWriter`` is one."""

    async def write(self, data: bytes) -> None:
        """Write all of ``data``, waiting for room as long as it takes. Raises OSError."""


def _nobody() -> None:
    """Wake no one."""


class OutputPump:
    """Writes what a buffer holds, as it comes.

    Where the reader has gone, the buffer is emptied all the same, so that no vCPU waits for a terminal that is
    not there any more.

    Args:
        buffer: where the bytes come from.
        writer: where they go.
        failed: called once, with the first error of a write.
    """

    def __init__(self, buffer: Buffer, writer: Sink, failed: Callable[[OSError], None]) -> None:
        self._buffer = buffer
        self._writer = writer
        self._failed = failed
        self._awake = trio.Event()
        self._scope = trio.CancelScope()
        self._ended = trio.Event()
        self._reported = False
        self._gone = False

    async def run(self) -> None:
        """Pump until ``end`` was called and all is written, or ``DRAIN_SECONDS`` have passed since."""
        token = trio.lowlevel.current_trio_token()

        def wake() -> None:
            with contextlib.suppress(trio.RunFinishedError):  # a vCPU that still prints when all is over
                token.run_sync_soon(self._wake, idempotent=True)

        self._buffer.set_wake(wake)
        try:
            with self._scope:
                while not self._ended.is_set():
                    await self._awake.wait()
                    self._awake = trio.Event()
                    await self._write_what_waits()
                    with trio.move_on_after(GATHER_SECONDS):
                        await self._ended.wait()
                # What threads put after the last wake-up was handled.
                await self._write_what_waits()
        finally:
            self._buffer.set_wake(_nobody)

    @property
    def cut_short(self) -> bool:
        """Whether ``run`` ended with something unwritten: nobody read it in time."""
        return self._scope.cancelled_caught

    def end(self) -> None:
        """Make ``run`` return once all is written, at the latest after ``DRAIN_SECONDS``."""
        self._ended.set()
        self._scope.deadline = trio.current_time() + DRAIN_SECONDS
        self._awake.set()

    def _wake(self) -> None:
        self._awake.set()

    async def _write_what_waits(self) -> None:
        while data := self._buffer.take():
            if self._gone:
                continue
            try:
                await self._writer.write(data)
            except OSError as error:
                self._gone = error.errno in _GONE
                if not self._reported:
                    self._reported = True
                    self._failed(error)
        await trio.lowlevel.checkpoint()
