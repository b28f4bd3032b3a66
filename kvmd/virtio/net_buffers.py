"""What a guest gave its network device to receive into: clauses 5.1.6.3 and 5.1.6.4 of virtio 1.2."""

from __future__ import annotations

from kvmd.virtio.live_queue import Ring
from kvmd.virtio.memory import GuestMemory, total_bytes, views
from kvmd.virtio.split_queue import Chain, QueueError

HEADER_BYTES = 12
"""The struct virtio_net_hdr, with num_buffers."""

PARTS_LIMIT = 512
"""Parts of buffers after which no further one is taken, however small they are: one buffer has 511 at most (a chain of
255 descriptors and an indirect table of 256), and what one readv takes is 1024 (IOV_MAX)."""

_NUM_BUFFERS = 10


class ReceiveBuffers:
    """Buffers that were taken from the queue and not yet filled: as many as the largest frame needs.

    All methods are called with the queue held.

    Args:
        memory: guest memory.
        frame_limit: bytes of the largest frame, with its header.
        mergeable: whether a frame may take several buffers (F_MRG_RXBUF).

    Attributes:
        views: where the next frame goes.
    """

    def __init__(self, memory: GuestMemory, frame_limit: int, *, mergeable: bool) -> None:
        self._memory = memory
        self._frame_limit = frame_limit
        self._mergeable = mergeable
        self._chains: list[Chain] = []
        self._sizes: list[int] = []
        self._parts: list[int] = []
        self._room = 0
        self.views: list[memoryview] = []

    def refresh(self) -> None:
        """Find all buffers in memory again, where what was found before may have been converted since.

        Raises:
            Inaccessible: one of them turned private.
        """
        if self._memory.converts and self._chains:
            self.views = [view for chain in self._chains for view in views(self._memory, chain.writable)]

    def fill(self, ring: Ring) -> bool:
        """Take buffers until the largest frame fits; tell whether a frame may be read.

        True also where the driver has nothing left to give, its ring being small, and where its buffers are in more
        parts than a frame can be read into: what does not fit is dropped.

        Raises:
            QueueError: a buffer has no room for a header.
            Inaccessible: a buffer is private, or not within memory.
        """
        if not self._mergeable:
            return bool(self._chains) or self._take(ring)
        while self._room < self._frame_limit and len(self.views) < PARTS_LIMIT:
            if not self._take(ring):
                return bool(self._chains) and ring.outstanding >= ring.size
        return True

    def _take(self, ring: Ring) -> bool:
        chain = ring.pop()
        if chain is None:
            return False
        size_bytes = total_bytes(chain.writable)
        if size_bytes < HEADER_BYTES:
            raise QueueError(f"a buffer for frames of {size_bytes} bytes: a header alone has {HEADER_BYTES}")
        self.views += views(self._memory, chain.writable)
        self._chains.append(chain)
        self._sizes.append(size_bytes)
        self._parts.append(len(chain.writable))
        self._room += size_bytes
        return True

    def views_after_header(self) -> list[memoryview]:
        """Return where the next frame goes if it comes without a header, and put a header of zeros there."""
        left = HEADER_BYTES
        for index, view in enumerate(self.views):
            if left < len(view):
                view[:left] = bytes(left)
                return [view[left:], *self.views[index + 1 :]]
            view[:] = bytes(len(view))
            left -= len(view)
        return []

    def deliver(self, ring: Ring, frame_bytes: int) -> bool:
        """Give the buffers that the frame filled back to the driver; false where it did not fit.

        Args:
            ring: the queue.
            frame_bytes: with the header.
        """
        count, room = 1, self._sizes[0]
        while room < frame_bytes:
            if not self._mergeable or count == len(self._chains):
                return False
            room += self._sizes[count]
            count += 1
        self._set_num_buffers(count)
        left = frame_bytes
        for chain, size_bytes in zip(self._chains[:count], self._sizes[:count], strict=True):
            written = min(left, size_bytes)
            ring.push(chain, written)
            left -= written
        del self.views[: sum(self._parts[:count])]
        del self._chains[:count], self._sizes[:count], self._parts[:count]
        self._room -= room
        return True

    def _set_num_buffers(self, count: int) -> None:
        first = self.views[0]
        low, high = count & 0xFF, count >> 8
        if len(first) >= HEADER_BYTES:
            first[_NUM_BUFFERS] = low
            first[_NUM_BUFFERS + 1] = high
            return
        at = _NUM_BUFFERS
        values = [low, high]
        for view in self.views:
            while at < len(view) and values:
                view[at] = values.pop(0)
                at += 1
            at -= len(view)
            if not values:
                return
