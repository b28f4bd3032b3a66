"""Memory of this process that is a guest's: read and written at its addresses, and given back page by page."""

from __future__ import annotations

import ctypes
from abc import abstractmethod
from collections.abc import Callable

from kvmd.closing import Closing
from kvmd.errors import HostError
from kvmd.memory import libc
from kvmd.ranges import GpaRange
from kvmd.units import format_size, page_ceil, page_floor


class HostMemory(Closing):
    """Memory for ``[0, size_bytes)`` of guest-physical memory, filled as it is touched.

    Args:
        name: for messages, such as ``private``.
        size_bytes: a multiple of the page.
        address: where it is mapped, from now on this object's to unmap.

    Attributes:
        on_write: called with the pages of each ``write``, after it: for an accelerator that has to be told.
        view: all of the memory as bytes. Nothing of it may be touched after ``close``: the addresses are gone then.
    """

    def __init__(self, name: str, size_bytes: int, address: int) -> None:
        self.name = name
        self.on_write: Callable[[GpaRange], None] | None = None
        self.size_bytes = size_bytes
        self.address = address
        self._closed = False
        self.view = memoryview((ctypes.c_ubyte * size_bytes).from_address(address)).cast("B")

    def address_of(self, gpa: int) -> int:
        """Return the host virtual address of ``gpa``."""
        return self.address + gpa

    def read(self, gpa: int, size_bytes: int) -> bytes:
        """Copy ``[gpa, gpa + size_bytes)``, which the caller knows to lie within memory."""
        self._check(gpa, size_bytes)
        return ctypes.string_at(self.address + gpa, size_bytes)

    def write(self, gpa: int, data: bytes) -> None:
        """Copy ``data`` to ``gpa``, which the caller knows to lie within memory."""
        self._check(gpa, len(data))
        ctypes.memmove(self.address + gpa, data, len(data))
        if self.on_write is not None and data:
            self.on_write(GpaRange(page_floor(gpa), page_ceil(gpa + len(data))))

    @abstractmethod
    def discard(self, range_: GpaRange) -> None:
        """Give the pages back to the host; they read as zeros from now on.

        Raises:
            BackendError: the host refused.
        """

    @abstractmethod
    def held_bytes(self) -> int:
        """Return the host memory that is held, in bytes."""

    def close(self) -> None:
        """Unmap and give up the memory; harmless the second time."""
        if not self._closed:
            self._closed = True
            self.view = memoryview(b"")
            libc.unmap(self.address, self.size_bytes)

    def _check(self, gpa: int, size_bytes: int) -> None:
        # A wild address here would be a hole in kvmd itself, so it is worth two comparisons.
        if self._closed or gpa < 0 or size_bytes < 0 or gpa + size_bytes > self.size_bytes:
            raise IndexError(f"{size_bytes} bytes at {gpa:#x} are outside {self.name} memory, or it is closed")


def too_much(size_bytes: int, error: OSError | OverflowError) -> HostError:
    """Return the error that says that this host cannot map that much."""
    # OverflowError: more than any file can have, which Python notices before the kernel does.
    why = error.strerror if isinstance(error, OSError) else "more than a file can hold"
    return HostError(f"memory: this host cannot map {format_size(size_bytes)} ({why}): ask for less")
