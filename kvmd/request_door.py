"""The door from the vCPU threads to the event loop: what they hand in, and how the loop learns of it.

A trio memory channel is not thread-safe, and waking the loop through ``trio.from_thread`` or ``run_sync_soon`` costs
a write to a socket and a turn of the loop for each call. Here a thread appends to a list, and wakes the loop through
an eventfd that a task waits on; or, while the loop's thread lingers for just that, through a lock, which saves the
turn (bench/handoff.py compares them).
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from typing import Generic, TypeVar

import trio

LINGER_SECONDS = 0.0005
"""How long the event loop's thread waits for the next item before it goes back to the loop.

A guest that converts comes back soon, and a turn of the event loop costs more than the rules of a conversion. Only
while items do come this soon."""

T = TypeVar("T")


class RequestDoor(Generic[T]):
    """Takes items from any thread; the event loop's thread takes them out.

    Lock order: the door's lock is innermost, and held for some instructions only.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._items: deque[T] = deque()
        self._eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._signalled = False
        # Held unless a thread that hands something in has just released it for the one that lingers.
        self._arrival = threading.Lock()
        self._arrival.acquire()
        self._lingering = False
        self._pays = False
        self._idle_since = 0.0
        self._closed = False
        self._count = 0

    # -- any thread ----------------------------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        """Items handed in so far, taken out or not."""
        return self._count

    def put(self, item: T) -> bool:
        """Hand in an item and wake the event loop; tell whether the door was open."""
        with self._lock:
            if self._closed:
                return False
            self._items.append(item)
            self._count += 1
            if self._lingering:
                self._lingering = False
                self._arrival.release()
            elif not self._signalled:
                # Under the lock, so that the flag and the eventfd's counter always say the same.
                self._signalled = True
                os.eventfd_write(self._eventfd, 1)
        return True

    # -- the event loop's thread ---------------------------------------------------------------------------------------

    async def wait(self) -> list[T]:
        """Wait for items and take them out. Only one task waits."""
        while True:
            await trio.lowlevel.wait_readable(self._eventfd)
            items = self.take()
            if items:
                self._pays |= time.monotonic() - self._idle_since < LINGER_SECONDS
                return items

    def take(self) -> list[T]:
        """Take out all items there are, perhaps none. Never blocks."""
        if not self._items:
            return []
        with self._lock:
            items = list(self._items)
            self._items.clear()
            if self._signalled:
                self._signalled = False
                os.eventfd_read(self._eventfd)
        return items

    def linger(self, most_seconds: float) -> list[T]:
        """Keep the thread, and the event loop waiting, for the next items; none where they do not come soon.

        Does not wait at all unless items came soon the last times: then the caller goes back to ``wait``.

        Args:
            most_seconds: the longest that the loop can wait, in seconds.
        """
        if most_seconds > 0 and self._pays and self._await_arrival(min(most_seconds, LINGER_SECONDS)):
            return self.take()
        if most_seconds >= LINGER_SECONDS:
            # It waited long enough to know; the next ``wait`` tells whether it would pay again.
            self._pays = False
        self._idle_since = time.monotonic()
        return self.take()

    def close(self) -> list[T]:
        """Let nothing in any more, and return what is there."""
        with self._lock:
            self._closed = True
        return self.take()

    def dispose(self) -> None:
        """Give up the eventfd, once no thread uses the door any more; harmless the second time."""
        if self._eventfd >= 0:
            os.close(self._eventfd)
            self._eventfd = -1

    def _await_arrival(self, seconds: float) -> bool:
        with self._lock:
            if self._items:
                return True
            self._lingering = True
        if self._arrival.acquire(timeout=seconds):
            return True
        with self._lock:
            came = not self._lingering
            self._lingering = False
        if came:
            # After the time was up and before the lock was taken: its release is there.
            self._arrival.acquire()
        return came
