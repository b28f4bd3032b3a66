"""A queue from the driver's DRIVER_OK to the next reset: its rings under their locks, its notification, its interrupts.

Lock order: the memory's ``hold`` (only where memory converts), then the queue's lock, then the device's registers. A
vCPU thread that resets the device takes the queue's lock alone, and whoever holds that has the memory lock already: so
a vCPU never waits for a conversion, which may be waiting for that very vCPU to leave the guest.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Protocol

import trio

from kvmd.memory.accessor import Inaccessible
from kvmd.virtio.memory import GuestMemory
from kvmd.virtio.split_queue import QueueError, SplitQueue


class QueueStopped(Exception):
    """The queue is not in use any more: the driver reset the device, or it has failed."""


class Owner(Protocol):
    """The device, as a queue sees it. Both may be called from any thread."""

    def fail(self, reason: str) -> None:
        """Stop until a reset: the driver broke a rule."""

    def interrupt(self) -> None:
        """Tell the driver that buffers were given back."""


class Transfers:
    """Counts I/O under way that goes straight into or out of guest memory: a reset waits for it, from a vCPU's thread.

    ``begin`` is called under the lock of the queue that the buffer came from, so a reset, which stops the queue under
    that lock, either sees it counted or comes before it.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._count = 0

    @property
    def busy(self) -> bool:
        """Whether any is under way."""
        return self._count > 0

    def begin(self) -> None:
        """Count one more."""
        with self._condition:
            self._count += 1

    def end(self) -> None:
        """Count one less."""
        with self._condition:
            self._count -= 1
            if not self._count:
                self._condition.notify_all()

    def wait(self, seconds: float) -> None:
        """Block the thread until none is under way, but not longer than that."""
        deadline = time.monotonic() + seconds
        with self._condition:
            while self._count and (left := deadline - time.monotonic()) > 0:
                self._condition.wait(left)


class LiveQueue:
    """Hands the rings to one thread at a time: ``with queue as ring:``.

    On the way out what was given back is published, and the driver interrupted where it wants to be. A broken rule
    becomes the device's failure, and ``QueueStopped`` for whoever is within.

    Args:
        index: its number in the device.
        ring: the rings.
        memory: where they are.
        owner: the device.
        notified: an eventfd that is written to at each notification; it belongs to the device.
    """

    def __init__(self, index: int, ring: SplitQueue, memory: GuestMemory, owner: Owner, notified: int) -> None:
        self.index = index
        self.size = ring.size
        self._ring = ring
        self._owner = owner
        self._notified = notified
        self._converts = memory.converts
        self._hold: Callable[[], AbstractContextManager[object]] = memory.hold
        self._held: AbstractContextManager[object] | None = None
        self._lock = threading.Lock()
        self._stopped = False
        self._attached = False

    @property
    def stopped(self) -> bool:
        """Whether the queue is not in use any more."""
        return self._stopped

    def __enter__(self) -> SplitQueue:
        held = None
        if self._converts:
            held = self._hold()
            held.__enter__()
        self._lock.acquire()
        self._held = held
        if self._stopped:
            self._leave()
            raise QueueStopped
        if self._converts or not self._attached:
            try:
                self._ring.attach()
            except Inaccessible as error:
                self._leave()
                self._owner.fail(f"queue {self.index}: {error}")
                raise QueueStopped from error
            self._attached = True
        return self._ring

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        wanted = self._ring.publish()
        self._leave()
        if wanted:
            self._owner.interrupt()
        if isinstance(error, QueueError | Inaccessible):
            self._owner.fail(f"queue {self.index}: {error}")
            raise QueueStopped from error

    def _leave(self) -> None:
        held, self._held = self._held, None
        self._lock.release()
        if held is not None:
            held.__exit__(None, None, None)

    def stop(self) -> None:
        """Touch the rings no more from the moment that this returns. From any thread; waits for who is within."""
        with self._lock:
            self._stopped = True

    def give_up(self) -> None:
        """As ``stop``, without waiting: whoever is within finishes. For the thread that may be within itself."""
        self._stopped = True

    async def wait(self) -> None:
        """Wait for a notification; there may be one about nothing."""
        await trio.lowlevel.wait_readable(self._notified)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._notified)
