"""A split virtqueue, the device's side: clause 2.7 of virtio 1.2. No locks, no I/O: see ``live_queue``.

Nothing in the rings is trusted. Each number is read from guest memory once, and what was read is what is checked and
used: a guest that writes at the same time changes the next read, not this one.

What Python on x86 needs for the order of accesses (clause 2.7.13): x86 keeps loads in order, stores in order, and a
store after an earlier load, and CPython makes each access of a ``memoryview`` item when its bytecode runs; so what was
written to the used ring is there before its index, and a ring entry is read after the index that covers it. Only a
store followed by a load of something else may change places, which matters twice: "index published, does the driver
want an interrupt?" and "notifications wanted, has something come meanwhile?". Between these stands ``_fence``: taking a
lock is an atomic read-modify-write, a full barrier on x86. 16-bit fields are read and written as items of a view cast
to ``H``, one aligned ``mov`` each; ``struct`` with an explicit byte order would go byte by byte, and tear.
"""

from __future__ import annotations

import struct
import threading

from kvmd.virtio.abi import (
    AVAIL_ALIGN,
    AVAIL_NO_INTERRUPT,
    DESC_ALIGN,
    DESC_BYTES,
    DESC_INDIRECT,
    DESC_NEXT,
    DESC_WRITE,
    QUEUE_SIZE_LIMIT,
    USED_ALIGN,
    USED_ELEMENT_BYTES,
    USED_NO_NOTIFY,
)
from kvmd.virtio.memory import GuestMemory

_DESCRIPTOR = struct.Struct("=QIHH")
_USED_ELEMENT = struct.Struct("=II")

_CHAIN_BYTES_LIMIT = 1 << 32
"""No chain describes more (clause 2.7.4)."""


class QueueError(Exception):
    """The driver broke a rule of the queue, which the message names. The queue is of no use until a reset."""


class Chain:
    """One buffer that the driver made available.

    Attributes:
        head: index of its first descriptor, by which it is given back.
        readable: what the device reads, as (gpa, bytes) in order. The addresses have not been looked at.
        writable: what the device writes, likewise.
    """

    __slots__ = ("head", "readable", "writable")

    def __init__(self, head: int, readable: list[tuple[int, int]], writable: list[tuple[int, int]]) -> None:
        self.head = head
        self.readable = readable
        self.writable = writable


class SplitQueue:
    """The device's side of one queue.

    Args:
        memory: where it is.
        size: descriptors in it, a power of 2.
        addresses: gpas of the descriptor table, the driver's (available) and the device's (used) ring.
        indirect_limit: descriptors that an indirect table may have; 0 where they were not negotiated.
        event_idx: whether F_EVENT_IDX was negotiated.

    Raises:
        QueueError: the size is no size, or a part is not aligned.
    """

    def __init__(
        self,
        memory: GuestMemory,
        size: int,
        addresses: tuple[int, int, int],
        *,
        indirect_limit: int = 0,
        event_idx: bool = False,
    ) -> None:
        if not 1 <= size <= QUEUE_SIZE_LIMIT or size & (size - 1):
            raise QueueError(f"a queue of {size} descriptors: it must be a power of 2 up to {QUEUE_SIZE_LIMIT}")
        names = ("descriptor table", "available ring", "used ring")
        for name, gpa, align in zip(names, addresses, (DESC_ALIGN, AVAIL_ALIGN, USED_ALIGN), strict=True):
            if gpa % align:
                raise QueueError(f"the {name} at {gpa:#x} is not aligned to {align} bytes")
        self._memory = memory
        self.size = size
        self._mask = size - 1
        self._addresses = addresses
        self._indirect_limit = indirect_limit
        self._event_idx = event_idx
        self._fence = threading.Lock()
        self._next_avail = 0
        self._avail_index = 0
        self._next_used = 0
        self._published = 0
        self._table = memoryview(b"")
        self._avail = memoryview(b"")
        self._used = memoryview(b"")
        self._used_bytes = memoryview(b"")

    # -- memory --------------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Find the three parts in memory. Within the memory's ``hold``: their views are valid as long as that.

        Raises:
            Inaccessible: a part is private, or not within memory.
        """
        table, avail, used = self._addresses
        self._table = self._memory.view(table, DESC_BYTES * self.size)
        self._avail = self._memory.view(avail, 6 + 2 * self.size).cast("H")
        self._used_bytes = self._memory.view(used, 6 + USED_ELEMENT_BYTES * self.size)
        self._used = self._used_bytes.cast("H")

    paused = False
    """In a pause another stands for it: ``live_queue.PausedRing``."""

    @property
    def outstanding(self) -> int:
        """Buffers that were taken and not given back."""
        return (self._next_avail - self._next_used) & 0xFFFF

    # -- taking --------------------------------------------------------------------------------------------------------

    def pop(self) -> Chain | None:
        """Take the next buffer that the driver made available, or None.

        Raises:
            QueueError: the driver broke a rule.
        """
        at = self._next_avail
        if at == self._avail_index:
            self._avail_index = index = self._avail[1]
            if index == at:
                return None
            # What is outstanding counts: a driver has no more buffers than descriptors. Counted from ``_next_used`` on,
            # an index that goes back among what is outstanding would pass for one that goes on by almost 65536.
            if ((index - at) & 0xFFFF) + self.outstanding > self.size:
                raise QueueError(
                    f"the available index jumped to {index}: {(index - at) & 0xFFFF} new buffers and "
                    f"{self.outstanding} in use are more than {self.size}"
                )
        head = self._avail[2 + (at & self._mask)]
        chain = self._walk(head)
        self._next_avail = (at + 1) & 0xFFFF
        return chain

    def unpop(self) -> None:
        """Put the buffer that was taken last back: it is taken again next."""
        self._next_avail = (self._next_avail - 1) & 0xFFFF

    def _walk(self, head: int) -> Chain:  # noqa: C901 - a loop for each descriptor of each request: no calls in it
        readable: list[tuple[int, int]] = []
        writable: list[tuple[int, int]] = []
        table, count, left, total = self._table, self.size, self.size, 0
        index, indirect = head, False
        while True:
            if index >= count:
                raise QueueError(f"descriptor {index} of a table of {count}")
            if not left:
                raise QueueError(f"the chain at descriptor {head} is longer than its table: it has a loop")
            left -= 1
            gpa, size_bytes, flags, following = _DESCRIPTOR.unpack_from(table, index * DESC_BYTES)
            if flags & DESC_INDIRECT:
                if indirect:
                    raise QueueError("an indirect table within an indirect table")
                if flags & DESC_NEXT:
                    raise QueueError(f"descriptor {index} is both indirect and followed by another")
                table, count = self._indirect_table(gpa, size_bytes)
                index, left, indirect = 0, count, True
                continue
            if not size_bytes:
                raise QueueError(f"descriptor {index} of the chain at {head} has no bytes")
            total += size_bytes
            if flags & DESC_WRITE:
                writable.append((gpa, size_bytes))
            elif writable:
                raise QueueError(f"the chain at descriptor {head} has a readable part after a writable one")
            else:
                readable.append((gpa, size_bytes))
            if not flags & DESC_NEXT:
                break
            index = following
        if total > _CHAIN_BYTES_LIMIT:
            raise QueueError(f"the chain at descriptor {head} describes {total} bytes, more than 4 GiB")
        return Chain(head, readable, writable)

    def _indirect_table(self, gpa: int, size_bytes: int) -> tuple[memoryview, int]:
        if not self._indirect_limit:
            raise QueueError("an indirect descriptor, which was not negotiated")
        count, rest = divmod(size_bytes, DESC_BYTES)
        if rest or not 1 <= count <= self._indirect_limit:
            raise QueueError(
                f"an indirect table of {size_bytes} bytes: it must be 1 to {self._indirect_limit} times {DESC_BYTES}"
            )
        return self._memory.view(gpa, size_bytes), count

    # -- giving back ---------------------------------------------------------------------------------------------------

    def push(self, chain: Chain, written_bytes: int) -> None:
        """Give a buffer back; the driver sees it after ``publish``.

        Args:
            chain: from ``pop``.
            written_bytes: how much was written, from the first writable byte on.
        """
        _USED_ELEMENT.pack_into(
            self._used_bytes, 4 + (self._next_used & self._mask) * USED_ELEMENT_BYTES, chain.head, written_bytes
        )
        self._next_used = (self._next_used + 1) & 0xFFFF
        if self._memory.tracks_writes:
            for gpa, size_bytes in chain.writable:
                self._memory.wrote(gpa, size_bytes)

    def publish(self) -> bool:
        """Show the driver what was given back, and tell whether it wants an interrupt for that."""
        old, new = self._published, self._next_used
        if old == new:
            return False
        self._used[1] = new
        self._published = new
        with self._fence:
            pass
        if not self._event_idx:
            return not self._avail[0] & AVAIL_NO_INTERRUPT
        # vring_need_event of clause 2.7.7.2: has the index passed the one that the driver waits for?
        event = self._avail[2 + self.size]
        return (new - event - 1) & 0xFFFF < (new - old) & 0xFFFF

    # -- notifications -------------------------------------------------------------------------------------------------

    def arm(self) -> bool:
        """Ask for a notification about the next buffer; true where there is one already, which needs none."""
        if self._event_idx:
            self._used[2 + 4 * self.size] = self._next_avail
        else:
            self._used[0] = 0
        with self._fence:
            pass
        return self._avail[1] != self._next_avail

    def disarm(self) -> None:
        """Ask for no notifications: buffers are looked for anyway. Only a hint, and none with F_EVENT_IDX."""
        if not self._event_idx:
            self._used[0] = USED_NO_NOTIFY
