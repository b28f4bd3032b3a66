"""Guest memory as the software CPU sees it: which view of each page is live, and where the host has it."""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Iterator, Mapping

from kvmd.ranges import GpaRange, PageState
from kvmd.software.code_pages import CodePages
from kvmd.units import PAGE_MASK, PAGE_SIZE

_PAGE_SHIFT = PAGE_SIZE.bit_length() - 1
_ENTRY_SIZE = 8


class GuestMemory:
    """The memory of one machine, in one view or in two.

    Which view is live changes under ``lock``, and never for a page that a running vCPU knows: see ``SoftwareVm``.

    Args:
        size_bytes: a multiple of the page.
        addresses: the host address of each view's memory; one view alone is live everywhere.
        c_bit: the position of the C-bit, which chooses the view (set = private); None for one view.
        initial: the view that is live at first.

    Attributes:
        code: the pages that hold code.
        lock: held while views change, and by a vCPU from the look at a view to its note that it knows the page.
        size_bytes: as given.
    """

    def __init__(
        self, size_bytes: int, addresses: Mapping[PageState, int], *, c_bit: int | None, initial: PageState
    ) -> None:
        self.size_bytes = size_bytes
        self.code = CodePages()
        self.lock = threading.Lock()
        self._addresses = dict(addresses)
        self._c_mask = 0 if c_bit is None else 1 << c_bit
        self._initial = initial
        # A byte for each page, not a bit: 1 where the view that is live is not the initial one. Pages of it that nobody
        # ever converted cost the host nothing.
        self._moved = mmap.mmap(-1, size_bytes >> _PAGE_SHIFT)

    @property
    def regions(self) -> Iterator[tuple[int, int]]:
        """The gpa, C-bit included, and the host address of each view's memory."""
        for view, address in self._addresses.items():
            yield self.in_view(0, view), address

    def in_view(self, gpa: int, view: PageState) -> int:
        """Return what the guest calls the plain ``gpa`` in a view."""
        return gpa | self._c_mask if view is PageState.PRIVATE else gpa

    def is_inside(self, gpa: int) -> bool:
        """Tell whether the gpa, C-bit included, is memory in one of the views, live or not."""
        return gpa & ~self._c_mask < self.size_bytes

    def is_private(self, gpa: int) -> bool:
        """Tell whether the gpa names the private view."""
        return bool(gpa & self._c_mask)

    def is_live(self, gpa: int) -> bool:
        """Tell whether the page of a gpa that is inside is live in the view that it names."""
        if not self._c_mask:
            return True
        view = PageState.PRIVATE if gpa & self._c_mask else PageState.SHARED
        moved = self._moved[(gpa & ~self._c_mask) >> _PAGE_SHIFT]
        return (view is self._initial) is not bool(moved)

    def make_live(self, range_: GpaRange, view: PageState) -> None:
        """Make the view of all pages of the range live, and forget what code either held."""
        first, end = range_.start >> _PAGE_SHIFT, range_.end >> _PAGE_SHIFT
        self._moved[first:end] = (b"\0" if view is self._initial else b"\1") * (end - first)
        for side in self._addresses:
            self.code.forget(*self.pages(range_, side))

    def overwrite_code(self, range_: GpaRange, view: PageState) -> None:
        """Note that the host wrote to pages of the range in a view."""
        self.code.overwrite(*self.pages(range_, view))

    def holds_code(self, range_: GpaRange, view: PageState) -> bool:
        """Tell whether a page of the range was executed in a view."""
        return self.code.holds_code(*self.pages(range_, view))

    def read_entry(self, gpa: int) -> int | None:
        """Return the eight bytes at a gpa, as a page walk reads them; None where it cannot."""
        data = self.read(gpa, _ENTRY_SIZE)
        return None if data is None else int.from_bytes(data, "little")

    def read(self, gpa: int, size_bytes: int) -> bytes | None:
        """Copy from within one page; None where the view is not live, or there is no memory."""
        if not self.is_inside(gpa) or not self.is_live(gpa):
            return None
        return ctypes.string_at(self._host_address(gpa), size_bytes)

    def write(self, gpa: int, data: bytes) -> None:
        """Copy to within one page, whose view is live."""
        ctypes.memmove(self._host_address(gpa), data, len(data))

    def close(self) -> None:
        """Give up the map of live views; harmless the second time."""
        self._moved.close()

    def _host_address(self, gpa: int) -> int:
        view = PageState.PRIVATE if gpa & self._c_mask or PageState.SHARED not in self._addresses else PageState.SHARED
        return self._addresses[view] + (gpa & ~self._c_mask)

    def pages(self, range_: GpaRange, view: PageState) -> tuple[int, int]:
        """Return the numbers of the first page of the range in a view, and of the one behind the last."""
        first = self.in_view(range_.start, view) >> _PAGE_SHIFT
        return first, first + range_.pages


def page_of(gpa: int) -> int:
    """Return the number of the page that a gpa is in."""
    return gpa >> _PAGE_SHIFT


def page_start(address: int) -> int:
    """Return the start of the page that an address is in."""
    return address & ~PAGE_MASK
