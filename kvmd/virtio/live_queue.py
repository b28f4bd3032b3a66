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
from kvmd.virtio.split_queue import Chain, QueueError, SplitQueue


class QueueStopped(Exception):
    """The queue is not in use any more: the driver reset the device, or it has failed."""


class Standstill:
    """What a paused machine's device may still do with its queues: changed by ``VirtioDevice`` alone.

    Attributes:
        taking: whether buffers are taken from the driver.
        giving: whether buffers are given back, or anything else of the rings is written.
    """

    __slots__ = ("giving", "taking")

    def __init__(self) -> None:
        self.taking = True
        self.giving = True


class Ring(Protocol):
    """The rings of a queue: ``SplitQueue``, which has the meaning of each, or what stands for it in a pause."""

    @property
    def paused(self) -> bool:
        """Whether the guest's memory is not to be written to: what would be done for it has to wait."""

    @property
    def size(self) -> int:
        """Descriptors in it."""

    @property
    def outstanding(self) -> int:
        """Buffers that were taken and not given back."""

    def pop(self) -> Chain | None:
        """Take the next buffer, or None."""

    def unpop(self) -> None:
        """Put the buffer that was taken last back."""

    def push(self, chain: Chain, written_bytes: int) -> None:
        """Give a buffer back."""

    def arm(self) -> bool:
        """Ask for a notification; true where there is a buffer already."""

    def disarm(self) -> None:
        """Ask for no notifications."""


class PausedRing:
    """The rings of a queue in a pause: nothing new is in them, and what is given back is kept for later.

    Args:
        ring: the rings.
        standstill: how far the pause has come.
        late: takes what is given back, where it may not be yet.
    """

    __slots__ = ("_late", "_ring", "_standstill")

    paused = True

    def __init__(self, ring: SplitQueue, standstill: Standstill, late: list[tuple[Chain, int]]) -> None:
        self._ring = ring
        self._standstill = standstill
        self._late = late

    @property
    def size(self) -> int:
        """Descriptors in it."""
        return self._ring.size

    @property
    def outstanding(self) -> int:
        """Buffers that were taken and not given back."""
        return self._ring.outstanding

    def pop(self) -> Chain | None:
        """Take nothing."""
        return None

    def unpop(self) -> None:
        """Not possible: nothing was taken."""
        raise AssertionError("nothing was taken")

    def push(self, chain: Chain, written_bytes: int) -> None:
        """Give a buffer back, now or after the pause."""
        if self._standstill.giving:
            self._ring.push(chain, written_bytes)
        else:
            self._late.append((chain, written_bytes))

    def arm(self) -> bool:
        """Say that there is nothing: the pause's end is told like a notification."""
        return False

    def disarm(self) -> None:
        """Leave the rings alone."""


class Owner(Protocol):
    """The device, as a queue sees it. Both methods may be called from any thread."""

    @property
    def standstill(self) -> Standstill:
        """What may be done in a pause."""

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
        self._standstill = owner.standstill
        self._late: list[tuple[Chain, int]] = []

    @property
    def stopped(self) -> bool:
        """Whether the queue is not in use any more."""
        return self._stopped

    def __enter__(self) -> Ring:
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
        if not self._standstill.taking:
            return PausedRing(self._ring, self._standstill, self._late)
        if self._late:
            for chain, written_bytes in self._late:
                self._ring.push(chain, written_bytes)
            self._late.clear()
        return self._ring

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        wanted = self._standstill.giving and self._ring.publish()
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

    def settle(self) -> None:
        """Wait for whoever is within: they have not seen that the owner's ``standstill`` changed. From any thread."""
        with self._lock:
            pass

    async def wait(self) -> None:
        """Wait for a notification; there may be one about nothing."""
        await trio.lowlevel.wait_readable(self._notified)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._notified)
