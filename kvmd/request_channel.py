"""The channel from the vCPU threads to the conversion service: a trio memory channel that any thread can send into.

A trio channel belongs to the event loop's thread, and waking the loop through ``trio.from_thread`` or
``run_sync_soon`` costs a write to a socket and a turn of the loop for each call. So a thread puts what it has into a
queue first, and whoever is awake on the loop's side carries it into the trio channel: the porter task, woken by an
eventfd, or the service itself, which lingers at the queue for as long as requests come soon. That saves the turn of the
loop (``kvmd bench handoff`` compares them).
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, TypeVar

import trio

from kvmd.bell import Bell, new_eventfd
from kvmd.errors import BackendError
from kvmd.wait_watch import WaitWatch

SOON_NS = 500_000
"""Nanoseconds within which the next item has to come for lingering to pay.

A guest that converts comes back soon, and a turn of the event loop costs more than the rules of a conversion."""

LINGER_SECONDS = 0.003
"""After one to two of these the event loop's thread waits no longer for the next item, and goes back to the loop."""

_NO_LIMIT = 1 << 30
"""There are never more messages than vCPUs; and trio compares whole numbers faster than with ``math.inf``."""

T = TypeVar("T")


class RequestChannel(Generic[T]):
    """Takes items from any thread, and gives them to one task, in order.

    There is no lock. Each flag is written by one side before it looks at the queue, and read by the other after it has
    put something there; so at least one of the two notices.

    Args:
        too_late: takes what is put after ``close``, in the thread that puts it.
        linger_seconds: a wait in ``linger`` ends after one to two of these.

    Raises:
        BackendError: the process has not two file descriptors left.
    """

    def __init__(self, too_late: Callable[[T], None], *, linger_seconds: float = LINGER_SECONDS) -> None:
        self._handed: deque[T] = deque()
        self._bell = Bell()
        self._ring, self._wait = self._bell.ring, self._bell.wait
        self._watch = WaitWatch(linger_seconds, lambda: self._taken, self._end_wait)
        # One message is all that came together. An item a vCPU: there are never more than vCPUs.
        self._send, self._receive = trio.open_memory_channel[list[T]](_NO_LIMIT)
        self._send_nowait, self._receive_nowait = self._send.send_nowait, self._receive.receive_nowait
        self._in_channel = 0
        self._taken = 0
        try:
            self._eventfd = new_eventfd(os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except BackendError:
            self._bell.close()
            raise
        self._signalled = False
        self._attended = False
        self._lingers = False
        self._give_up = False
        self._pays = False
        self._idle_since_ns = 0
        self._closed = False
        self._too_late = too_late

    # -- any thread ----------------------------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        """Items put in so far, taken out or not."""
        return self._taken + len(self._handed)

    def put(self, item: T) -> None:
        """Send an item. Never blocks."""
        self._handed.append(item)
        if self._lingers:
            self._ring()
        elif not (self._attended or self._signalled):
            self._signalled = True
            os.eventfd_write(self._eventfd, 1)
        if self._closed:
            # close() may have looked before this was there; each item is taken out once, by it or here.
            for late in self._drain():
                self._too_late(late)

    # -- the event loop's thread: the porter ---------------------------------------------------------------------------

    async def carry(self) -> None:
        """Carry items from the threads' queue into the trio channel, until cancelled. One task does."""
        while True:
            await trio.lowlevel.wait_readable(self._eventfd)
            os.eventfd_read(self._eventfd)
            self._signalled = False
            if not self._attended and (items := self._drain()):
                if not self._closed:
                    self._pays |= time.monotonic_ns() - self._idle_since_ns < SOON_NS
                self._carry_over(items)

    # -- the event loop's thread: the receiver -------------------------------------------------------------------------

    async def receive(self) -> list[T]:
        """Wait for items and take them out: all that came together."""
        items = await self._receive.receive()
        self._in_channel -= 1
        return items

    def attend(self) -> None:
        """Promise to ``take`` often: from now on nobody signals that something came, and the porter carries nothing."""
        self._attended = True

    def leave(self) -> None:
        """Take the promise back, before the event loop goes on; then ``take`` once more."""
        self._attended = False

    def take(self) -> list[T]:
        """Take out all items there are, perhaps none. Never blocks."""
        if self._handed and (handed := self._drain()):
            self._carry_over(handed)
        if not self._in_channel:
            return []
        self._in_channel -= 1
        items = self._receive_nowait()
        while self._in_channel:
            self._in_channel -= 1
            items += self._receive_nowait()
        return items

    def take_apart(self) -> list[T]:
        """Take out what there is, in another thread than the event loop's, to which the trio channel is closed.

        For a receiver that attends, and has taken what the trio channel held, until the event loop has it back.
        """
        return self._drain()

    def linger(self) -> list[T]:
        """Keep the thread, and the event loop waiting, for the next items; none where they do not come soon.

        Does not wait at all unless items came soon the last times: then the caller goes back to ``receive``.
        """
        if self._pays and not self._in_channel:
            handed, watch = self._handed, self._watch
            watch.waiting = True
            if watch.watching or watch.resume():
                self._lingers = True
                while not (handed or self._give_up):
                    self._wait()
                self._lingers = False
                watch.waiting = False
                if handed:
                    item = handed.popleft()
                    self._taken += 1
                    self._send_nowait([item])
                    if not handed:
                        return self._receive_nowait()
                    self._in_channel += 1
                    return self.take()
                self._give_up = False
            watch.waiting = False
            self._pays = False
        self._idle_since_ns = time.monotonic_ns()
        return self.take()

    def close(self) -> list[T]:
        """Let nothing in any more, and return what is there. Harmless the second time."""
        self._closed = True
        # From now on who puts something takes it out again, so linger must wait for nothing.
        self._pays = False
        items = self._drain()
        # What is on its way to a task that waits in receive() is in the count, and no longer in the channel.
        with suppress(trio.WouldBlock):
            while True:
                items += self._receive_nowait()
                self._in_channel -= 1
        return items

    def dispose(self) -> None:
        """Give up the descriptors, once no thread uses the channel any more; harmless the second time."""
        self._watch.close()
        self._bell.close()
        if self._eventfd >= 0:
            os.close(self._eventfd)
            self._eventfd = -1

    # -- inside --------------------------------------------------------------------------------------------------------

    def _end_wait(self) -> None:
        """End a wait in ``linger``. In the watching thread."""
        self._give_up = True
        self._ring()

    def _carry_over(self, items: list[T]) -> None:
        self._send_nowait(items)
        self._in_channel += 1

    def _drain(self) -> list[T]:
        items: list[T] = []
        # Two threads may be here at the end.
        with suppress(IndexError):
            while self._handed:
                items.append(self._handed.popleft())
        self._taken += len(items)
        return items
