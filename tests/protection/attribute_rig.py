"""A protection that converts by attributes, on a VM that follows KVM's rules, and what the guest should find there."""

from __future__ import annotations

import threading
from contextlib import ExitStack

from kvmd.conversion.changes import FailureKind
from kvmd.errors import HostError
from kvmd.memory.backing import Backing
from kvmd.memory.page_state import PageStateMap
from kvmd.protection.attribute_views import AttributeViews
from kvmd.protection.guest_memfd import GuestMemfdProtection
from kvmd.ranges import GpaRange, PageState
from kvmd.units import PAGE_SIZE
from tests.protection.fakes import FakeMemfd, FakeVm

C_BIT = 45
PRIVATE, SHARED = PageState.PRIVATE, PageState.SHARED
KINDS = ["attribute", "guest-memfd"]
MEMORY, PINNED, SLOT = 24, 3, 8
"""Pages of memory, of which pinned, and of a memslot at most: small, so that there are several."""


def pages(start: int, end: int) -> GpaRange:
    return GpaRange(start * PAGE_SIZE, end * PAGE_SIZE)


class Rig:
    """A protection, the conversion service's part around it, and a model of what the guest should find."""

    def __init__(self, kind: str, *, initial: PageState = PRIVATE, pinned: int = PINNED) -> None:
        self.kind, self.pinned = kind, pinned
        self.vm = FakeVm(64, software_protected=True)
        self.resources = ExitStack()
        size = MEMORY * PAGE_SIZE
        self.backings = {side: self.resources.enter_context(Backing(side.value, size)) for side in PageState}
        self.state = PageStateMap(size, initial)
        pinned_state = PRIVATE if kind == "attribute" else SHARED
        self.state.set(pages(0, pinned), pinned_state, 0, explicit=False)
        self.lock = threading.Lock()
        self.protection: AttributeViews[FakeMemfd] | GuestMemfdProtection[FakeMemfd]
        try:
            if kind == "attribute":
                self.protection = AttributeViews(self.vm, self.backings, c_bit=C_BIT, state=self.state)
            else:
                self.protection = GuestMemfdProtection(
                    self.vm, self.backings[SHARED], pinned=pages(0, pinned), state=self.state, lock=self.lock
                )
        except HostError:
            self.close()
            raise
        self.model = [pinned_state] * pinned + [initial] * (MEMORY - pinned)
        self.held = [0] * MEMORY
        """What the guest stored last in each page, since it was converted."""

    def convert(self, start: int, end: int, to: PageState) -> FailureKind | None:
        """Make one change as the conversion service does."""
        range_ = pages(start, end)
        with self.lock:
            applied = self.protection.apply(range_, to)
            assert applied.end in {range_.start, range_.end}, "all or nothing"
            if applied.failure is not None:
                assert applied.end == range_.start
                assert applied.failure.message
                return applied.failure.kind
            self.state.set(range_, to, 1, explicit=True)
            self.protection.discard(range_, to.opposite)
        for page in range(start, end):
            if self.model[page] is not to:
                self.model[page], self.held[page] = to, 0
        return None

    def gpa(self, page: int, view: PageState) -> int:
        return page * PAGE_SIZE | (1 << C_BIT if self.kind == "attribute" and view is PRIVATE else 0)

    def found(self, page: int, view: PageState) -> str:
        """Return what the guest finds; memory is checked to be the right one."""
        gpa = self.gpa(page, view)
        found, slot = self.vm.access(gpa), self.vm.slot_at(gpa)
        assert slot is not None, "no slot is ever away"
        if found == "live":
            assert slot.userspace_addr + (gpa - slot.gpa) == self.backings[view].address_of(page * PAGE_SIZE)
        if found == "private":
            assert slot.memfd_offset + (gpa - slot.gpa) == page * PAGE_SIZE
        return found

    def store(self, page: int, value: int) -> None:
        """Store as the guest does, into the page in its present state."""
        live = self.model[page]
        if self.found(page, live) == "private":
            self.vm.memfds[0].pages[page * PAGE_SIZE] = value
        else:
            self.backings[live].write(page * PAGE_SIZE, bytes([value]))
        self.held[page] = value

    def load(self, page: int) -> int:
        live = self.model[page]
        if self.found(page, live) == "private":
            return self.vm.memfds[0].pages.get(page * PAGE_SIZE, 0)
        return self.backings[live].read(page * PAGE_SIZE, 1)[0]

    def store_emulated(self, page: int, value: int) -> None:
        """Store into the side that is not live, without an exit, as KVM's emulation of ``rep insb`` does."""
        if self.kind == "attribute":
            self.backings[self.model[page].opposite].write(page * PAGE_SIZE, bytes([value]))
        elif self.model[page] is PRIVATE:
            self.backings[SHARED].write(page * PAGE_SIZE, bytes([value]))

    def check(self) -> None:
        """Assert that the guest finds each page in the state, and with the content, that it should have."""
        for page, live in enumerate(self.model):
            if self.kind == "attribute":
                assert (self.found(page, live), self.found(page, live.opposite)) == ("live", "tripwire"), page
            else:
                assert self.found(page, live) == ("private" if live is PRIVATE else "live"), page
            assert self.load(page) == self.held[page], page

    def check_safe(self) -> None:
        """Assert what holds after any failure, too: never both views of a page."""
        for page, live in enumerate(self.model):
            if self.kind == "attribute":
                assert self.found(page, live.opposite) == "tripwire", page
                if self.found(page, live) != "live":
                    assert self.protection.diagnose(pages(page, page + 1), live), page

    def close(self) -> None:
        if hasattr(self, "protection"):
            self.protection.close()
        self.resources.close()
