"""The one door through which the host (devices, API) reads and writes guest memory: shared pages only."""

from __future__ import annotations

import threading

from kvmd.errors import KvmdError
from kvmd.memory.backing import Backing
from kvmd.memory.page_state import PageStateMap
from kvmd.ranges import GpaRange, PageState
from kvmd.units import page_ceil, page_floor


class PrivateMemory(KvmdError):
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
    """

    def __init__(self, state: PageStateMap, shared: Backing, lock: threading.Lock) -> None:
        self._state = state
        self._shared = shared
        self._lock = lock

    def read(self, gpa: int, size_bytes: int) -> bytes:
        """Copy ``size_bytes`` from ``gpa``.

        Raises:
            PrivateMemory: a page of it is private.
            IndexError: not within memory, or no bytes at all.
        """
        with self._lock:
            self._require_shared(gpa, size_bytes)
            return self._shared.read(gpa, size_bytes)

    def write(self, gpa: int, data: bytes) -> None:
        """Copy ``data`` to ``gpa``.

        Raises:
            PrivateMemory: a page of it is private.
            IndexError: not within memory, or no bytes at all.
        """
        with self._lock:
            self._require_shared(gpa, len(data))
            self._shared.write(gpa, data)

    def _require_shared(self, gpa: int, size_bytes: int) -> None:
        if size_bytes <= 0 or gpa < 0 or gpa + size_bytes > self._state.range.end:
            raise IndexError(f"{size_bytes} bytes at {gpa:#x} are not within memory {self._state.range}")
        pages = GpaRange(page_floor(gpa), page_ceil(gpa + size_bytes))
        private = self._state.first_in_state(PageState.PRIVATE, pages)
        if private is not None:
            raise PrivateMemory(private)
