"""Both protections that convert by attributes, over a VM that follows KVM's rules."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvmd.conversion.changes import FailureKind
from kvmd.conversion.messages import MmioAccess
from kvmd.errors import BackendError, HostError
from kvmd.hv.exits import MemoryFault
from kvmd.memory.backing import Backing
from kvmd.memory.page_state import PageStateMap
from kvmd.protection import attribute_views, guest_memfd
from kvmd.protection.attribute_views import AttributeViews
from kvmd.protection.attributes import CHUNK_BYTES, parts, told
from kvmd.protection.base import Protection
from kvmd.protection.guest_memfd import GuestMemfdProtection
from kvmd.ranges import GpaRange, PageState
from kvmd.units import MIB, PAGE_SIZE
from tests.protection.fakes import FakeMemfd, FakeVm

C_BIT = 45
PRIVATE, SHARED = PageState.PRIVATE, PageState.SHARED
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


KINDS = ["attribute", "guest-memfd"]


@pytest.fixture(autouse=True)
def small_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (attribute_views, guest_memfd):
        monkeypatch.setattr(module, "SLOT_BYTES", SLOT * PAGE_SIZE)


@pytest.fixture(params=KINDS)
def make(request: pytest.FixtureRequest) -> Iterator[Callable[..., Rig]]:
    with ExitStack() as stack:

        def build(**kwargs: object) -> Rig:
            rig = Rig(request.param, **kwargs)  # type: ignore[arg-type]
            stack.callback(rig.close)
            return rig

        yield build


class Conversions(RuleBasedStateMachine):
    """Any conversions, stores, and stores that KVM emulates, in any order; calls of KVM fail now and then."""

    @initialize(kind=st.sampled_from(KINDS), initial=st.sampled_from(PageState), pinned=st.sampled_from([1, 3, 8]))
    def build(self, kind: str, initial: PageState, pinned: int) -> None:
        self.rig = Rig(kind, initial=initial, pinned=pinned)

    @rule(start=st.integers(0, MEMORY - 1), size=st.integers(1, MEMORY), to=st.sampled_from(PageState))
    def convert(self, start: int, size: int, to: PageState) -> None:
        start = max(start, self.rig.pinned)
        assert self.rig.convert(start, min(start + size, MEMORY), to) is None

    @rule(start=st.integers(0, MEMORY - 1), size=st.integers(1, MEMORY), to=st.sampled_from(PageState), data=st.data())
    def convert_and_be_refused(self, start: int, size: int, to: PageState, data: st.DataObject) -> None:
        rig = self.rig
        start = max(start, rig.pinned)
        nth = data.draw(st.integers(1, 2 if rig.kind == "attribute" else 1))
        rig.vm.fail_next(nth, errno.ENOMEM)
        assert rig.convert(start, min(start + size, MEMORY), to) is FailureKind.REFUSED

    @rule(page=st.integers(0, MEMORY - 1), value=st.integers(1, 255))
    def store(self, page: int, value: int) -> None:
        self.rig.store(page, value)

    @rule(page=st.integers(PINNED, MEMORY - 1), value=st.integers(1, 255))
    def store_emulated(self, page: int, value: int) -> None:
        self.rig.store_emulated(page, value)

    @precondition(lambda self: hasattr(self, "rig"))
    @invariant()
    def the_guest_finds_what_it_should(self) -> None:
        self.rig.check()

    def teardown(self) -> None:
        if hasattr(self, "rig"):
            vm = self.rig.vm
            self.rig.close()
            assert not vm.slots
            assert not vm.private
            assert all(memfd.closed for memfd in vm.memfds)


TestConversions = Conversions.TestCase
TestConversions.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)


@pytest.mark.parametrize("initial", PageState)
def test_memory_starts_as_it_is_told(make: Callable[..., Rig], initial: PageState) -> None:
    rig = make(initial=initial)
    rig.check()
    flagged = [slot for slot in rig.vm.slots.values() if slot.flags & ~4]
    assert not flagged, "neither dirty logging nor read-only memory"


def test_a_conversion_is_one_ioctl_a_view(make: Callable[..., Rig]) -> None:
    rig = make()
    before = rig.vm.calls
    rig.vm.attribute_calls = 0
    assert rig.convert(3, 24, SHARED) is None
    assert rig.vm.attribute_calls == (2 if rig.kind == "attribute" else 1)
    # The rest is the punch of the guest_memfd: no slot was touched.
    assert rig.vm.calls - before == 2
    rig.check()


def test_pages_that_are_in_the_state_keep_what_they_hold(make: Callable[..., Rig]) -> None:
    rig = make()
    rig.convert(10, 12, SHARED)
    rig.store(10, 7)
    rig.store(9, 8)
    assert rig.convert(8, 16, SHARED) is None
    assert [rig.load(page) for page in (9, 10, 11)] == [0, 7, 0]


def test_the_dead_view_is_dead_before_the_other_one_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig("attribute")
    enter = rig.vm._enter
    seen = []

    def look(operation: str) -> None:
        seen.append((rig.found(9, PRIVATE), rig.found(9, SHARED)))
        enter(operation)

    monkeypatch.setattr(rig.vm, "_enter", look)
    assert rig.convert(9, 10, SHARED) is None
    assert seen == [("live", "tripwire"), ("tripwire", "tripwire")]
    monkeypatch.undo()
    rig.close()


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EINVAL])
def test_a_refusal_changes_nothing_and_names_the_error(make: Callable[..., Rig], number: int) -> None:
    rig = make()
    rig.store(9, 5)
    rig.vm.fail_next(1, number)
    applied = rig.protection.apply(pages(9, 12), SHARED)
    assert applied.end == 9 * PAGE_SIZE
    assert applied.failure is not None
    assert applied.failure.kind is FailureKind.REFUSED
    assert f"({errno.errorcode[number]})" in applied.failure.message
    assert "[0x" in applied.failure.message
    rig.check()


def test_a_view_that_cannot_be_revived_is_safe_told_and_mended_by_the_next_conversion() -> None:
    rig = Rig("attribute")
    rig.vm.fail_next(2, errno.ENOMEM, times=2)
    applied = rig.protection.apply(pages(9, 12), SHARED)
    assert applied.failure is not None
    assert "neither view is live" in applied.failure.message
    rig.check_safe()
    assert "neither view is live" in rig.protection.diagnose(pages(11, 12), PRIVATE)
    assert rig.protection.diagnose(pages(12, 13), PRIVATE) == ""
    assert rig.convert(9, 12, SHARED) is None
    assert rig.convert(9, 12, PRIVATE) is None
    rig.check()
    assert rig.protection.diagnose(pages(9, 12), PRIVATE) == ""
    rig.close()


def test_a_side_that_cannot_be_emptied_does_not_become_live(
    make: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make()
    rig.store(9, 5)
    rig.store_emulated(9, 6)

    def refuse(_self: Backing, _range: GpaRange) -> None:
        raise BackendError("cannot punch", errno.EIO)

    monkeypatch.setattr(Backing, "discard", refuse)
    assert rig.convert(9, 10, SHARED) is FailureKind.DISCARD_FIRST
    rig.check()


@pytest.mark.parametrize("nth", range(1, 12))
def test_a_machine_that_kvm_refuses_is_a_host_error_and_leaves_nothing(
    make: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    kind = make().kind
    vms: list[FakeVm] = []

    class Refusing(FakeVm):
        def __init__(self, slot_count: int = 512, gpa_bits: int = 48, *, software_protected: bool = False) -> None:
            super().__init__(slot_count, gpa_bits, software_protected=software_protected)
            self.fail_next(nth, errno.ENOMEM)
            vms.append(self)

    monkeypatch.setattr("tests.protection.test_attributes.FakeVm", Refusing)
    calls = 7 if kind == "attribute" else 6
    if nth > calls:
        # The set-up is over; what KVM does not take back at the end goes with the VM.
        Rig(kind).close()
        return
    with pytest.raises(HostError, match=r"\(ENOMEM\): ask for less memory"):
        Rig(kind)
    assert all(not vm.slots for vm in vms)
    assert all(memfd.closed for vm in vms for memfd in vm.memfds)


def test_all_memory_pinned(make: Callable[..., Rig]) -> None:
    rig = make(pinned=MEMORY)
    rig.check()
    assert not rig.vm.memfds


# -- what the service and the exit handler ask ---------------------------------------------------------------


def test_two_views_are_told_by_the_c_bit() -> None:
    rig = Rig("attribute")
    protection: Protection = rig.protection
    assert protection.locate(1 << C_BIT | 0x1234) == (0x1234, PRIVATE)
    assert protection.locate(0x1234) == (0x1234, SHARED)
    assert protection.locate(MEMORY * PAGE_SIZE) == (MEMORY * PAGE_SIZE, None)
    assert protection.wanted(MemoryFault(1 << C_BIT | 0x5000, 0x1000, private=True)) == (0x5000, PRIVATE)
    assert protection.wanted(MemoryFault(0x5000, 0x1000, private=True)) == (0x5000, SHARED)
    rig.close()


def test_one_view_is_what_the_page_is_and_a_fault_what_its_flag_says() -> None:
    rig = Rig("guest-memfd")
    protection: Protection = rig.protection
    assert protection.locate(0x1234) == (0x1234, SHARED), "pinned"
    assert protection.locate(9 * PAGE_SIZE) == (9 * PAGE_SIZE, PRIVATE)
    assert protection.locate(MEMORY * PAGE_SIZE) == (MEMORY * PAGE_SIZE, None)
    assert protection.wanted(MemoryFault(0x5000, 0x1000, private=True)) == (0x5000, PRIVATE)
    assert protection.wanted(MemoryFault(0x5000, 0x1000, private=False)) == (0x5000, SHARED)
    rig.close()


def test_the_host_accesses_shared_memory_only() -> None:
    rig = Rig("guest-memfd")
    protection = rig.protection
    assert (protection.can_access(PRIVATE), protection.can_access(SHARED)) == (False, True)
    assert protection.access(SHARED, MmioAccess(0x1008, 4, b"abcd")) == b""
    assert protection.access(SHARED, MmioAccess(0x1006, 8, None)) == b"\0\0abcd\0\0"
    rig.close()


def test_a_diagnosis_names_the_likely_cause() -> None:
    rig = Rig("guest-memfd")
    assert rig.protection.diagnose(pages(1, 2), PRIVATE) == "its memslot has no guest_memfd"
    assert "emulate" in rig.protection.diagnose(pages(9, 10), PRIVATE)
    assert "host memory" in rig.protection.diagnose(pages(9, 10), SHARED)
    rig.protection.close()
    assert rig.protection.diagnose(pages(9, 10), PRIVATE) == "its memslot is gone"
    rig.close()


def test_the_facts_say_what_the_machine_has(make: Callable[..., Rig]) -> None:
    rig = make()
    assert rig.protection.facts() == (
        {"protection": "emulated", "tripwire": "attribute", "c_bit": C_BIT, "memslots": 6}
        if rig.kind == "attribute"
        else {"protection": "guest-memfd", "vm_type": "KVM_X86_SW_PROTECTED_VM", "memslots": 4}
    )


def test_parts_are_cut_at_multiples() -> None:
    assert list(parts(pages(3, 20), 8 * PAGE_SIZE)) == [pages(3, 8), pages(8, 16), pages(16, 20)]
    assert list(parts(GpaRange(0, CHUNK_BYTES), CHUNK_BYTES)) == [GpaRange(0, CHUNK_BYTES)]


def test_a_large_machine_starts_in_bounded_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    vm = FakeVm(software_protected=True)
    sizes: list[int] = []
    set_ = vm.set_memory_attributes

    def spy(gpa_range: GpaRange, attributes: int) -> None:
        sizes.append(gpa_range.size_bytes)
        set_(gpa_range, attributes)

    monkeypatch.setattr(vm, "set_memory_attributes", spy)
    with Backing("shared", 1024 * MIB) as shared:
        state = PageStateMap(shared.size_bytes, PRIVATE)
        state.set(GpaRange(0, 2 * MIB), SHARED, 0, explicit=False)
        protection = GuestMemfdProtection(vm, shared, pinned=GpaRange(0, 2 * MIB), state=state, lock=threading.Lock())
        assert len(vm.slots) == 2
        assert max(sizes) == CHUNK_BYTES
        assert sum(sizes) == 1022 * MIB
        protection.close()
        protection.close()


def test_an_error_without_a_number_is_told_as_it_is() -> None:
    assert told(BackendError("no")) == "no"
    assert told(BackendError("no", errno.EIO)) == "no (EIO)"
