"""The one door through which the host (devices, API) reads and writes guest memory: shared pages only."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext

from kvmd.errors import KvmdError
from kvmd.memory.host_memory import HostMemory
from kvmd.memory.page_state import PageStateMap
from kvmd.ranges import GpaRange, PageState
from kvmd.units import page_ceil, page_floor


class Inaccessible(KvmdError):
    """The host asked for guest memory that it cannot have."""


class OutsideMemory(Inaccessible, IndexError):
    """The host asked for bytes that are not all within guest memory, or for none."""


class PrivateMemory(Inaccessible):
    """The host asked for guest memory that is private.

    Attributes:
        gpa: the first private page's address in bytes.
    """

    def __init__(self, gpa: int) -> None:
        super().__init__(f"guest memory at {gpa:#x} is private: only the guest may see it")
        self.gpa = gpa


class HostAccessor:
    """Reads and writes shared guest memory.

    Each access is made under the machine's memory lock: no page of it turns private in the middle.

    Args:
        state: the machine's page state.
        shared: the backing of the shared view.
        lock: the memory lock, which every conversion holds.
        converts: whether a page may ever be converted. Where none may (``protection none``), ``view`` needs no lock.
        hole: addresses within it that are no memory: where a Linux guest's devices are, with memory on both sides.

    Attributes:
        converts: as given.
    """

    def __init__(
        self,
        state: PageStateMap,
        shared: HostMemory,
        lock: threading.Lock,
        *,
        converts: bool = True,
        hole: GpaRange | None = None,
    ) -> None:
        self._state = state
        self._shared = shared
        self._lock = lock
        self._end = state.range.end
        self.converts = converts
        self._hole_start, self._hole_end = (self._end, self._end) if hole is None else (hole.start, hole.end)

    def read(self, gpa: int, size_bytes: int) -> bytes:
        """Copy ``size_bytes`` from ``gpa``.

        Raises:
            PrivateMemory: a page of it is private.
            OutsideMemory: not within memory, or no bytes at all.
        """
        with self._lock:
            self._require_shared(gpa, size_bytes)
            return self._shared.read(gpa, size_bytes)

    def write(self, gpa: int, data: bytes) -> None:
        """Copy ``data`` to ``gpa``.

        Raises:
            PrivateMemory: a page of it is private.
            OutsideMemory: not within memory, or no bytes at all.
        """
        with self._lock:
            self._require_shared(gpa, len(data))
            self._shared.write(gpa, data)

    # -- without a copy, for devices -----------------------------------------------------------------------------------

    def hold(self) -> AbstractContextManager[object]:
        """Return what keeps views valid while it is entered: the memory lock; nothing where no page is ever converted.

        What is done under it must not block: conversions wait for it, and so do vCPUs.
        """
        return self._lock if self.converts else nullcontext()

    def view(self, gpa: int, size_bytes: int) -> memoryview:
        """Return the bytes at ``gpa`` themselves, to be read and written.

        Valid within ``hold``, in which it must be called; where no page is ever converted, until the memory is closed.
        Whoever writes through it says so with ``wrote`` where ``tracks_writes``.

        Raises:
            PrivateMemory: a page of it is private.
            OutsideMemory: not within memory, or no bytes at all.
        """
        end = gpa + size_bytes
        if self.converts:
            self._require_shared(gpa, size_bytes)
        elif size_bytes <= 0 or gpa < 0 or end > self._end or (gpa < self._hole_end and end > self._hole_start):
            raise OutsideMemory(f"{size_bytes} bytes at {gpa:#x} are not within memory {self._state.range}")
        return self._shared.view[gpa:end]

    @property
    def tracks_writes(self) -> bool:
        """Whether somebody has to be told of what was written through a view."""
        return self._shared.on_write is not None

    def wrote(self, gpa: int, size_bytes: int) -> None:
        """Tell who has to know that these bytes were written through a view."""
        if self._shared.on_write is not None:
            self._shared.on_write(GpaRange(page_floor(gpa), page_ceil(gpa + size_bytes)))

    def discard(self, range_: GpaRange) -> int:
        """Give the shared pages of the range back to the host, and return their bytes; they read as zeros from now on.

        Private pages and addresses outside memory are passed over: what a guest offers need not be ours to take.

        Raises:
            BackendError: the host refused.
        """
        if range_.start >= self._end:
            return 0
        within = GpaRange(range_.start, min(range_.end, self._end))
        discarded = 0
        with self._lock:
            for run in list(self._state.runs(PageState.SHARED, within)):
                # What lies in the hole has a state like all else, and is no memory all the same.
                below, above = min(run.end, self._hole_start), max(run.start, self._hole_end)
                for start, end in ((run.start, below), (above, run.end)):
                    if start < end:
                        self._shared.discard(GpaRange(start, end))
                        discarded += end - start
        return discarded

    def _require_shared(self, gpa: int, size_bytes: int) -> None:
        end = gpa + size_bytes
        if size_bytes <= 0 or gpa < 0 or end > self._end or (gpa < self._hole_end and end > self._hole_start):
            raise OutsideMemory(f"{size_bytes} bytes at {gpa:#x} are not within memory {self._state.range}")
        pages = GpaRange(page_floor(gpa), page_ceil(gpa + size_bytes))
        private = self._state.first_in_state(PageState.PRIVATE, pages)
        if private is not None:
            raise PrivateMemory(private)
