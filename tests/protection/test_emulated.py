"""Emulated protection over a VM that follows KVM's rules, with both kinds of tripwire."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvmd.conversion.changes import FailureKind
from kvmd.conversion.messages import MmioAccess
from kvmd.errors import BackendError, HostError
from kvmd.hv.exits import MemoryFault
from kvmd.memory.backing import Backing
from kvmd.protection import emulated
from kvmd.protection.base import Protection
from kvmd.protection.emulated import MOST_BLOCKS, EmulatedProtection
from kvmd.protection.two_views import Tripwire
from kvmd.ranges import GpaRange, PageState
from kvmd.units import MIB, PAGE_SIZE, TIB
from tests.protection.fakes import FakeMemfd, FakeVm

C_BIT = 45
PRIVATE, SHARED = PageState.PRIVATE, PageState.SHARED
BY_SLOTS = [Tripwire.GUEST_MEMFD, Tripwire.HOLE]
BLOCK = 8
"""Pages in a block here: small, so that a few pages of memory have several blocks."""


def pages(start: int, end: int) -> GpaRange:
    return GpaRange(start * PAGE_SIZE, end * PAGE_SIZE)


class Rig:
    """A protection of ``memory`` pages, the first ``pinned`` of them pinned, and a model of what it should be."""

    def __init__(
        self, tripwire: Tripwire, *, memory: int = 40, pinned: int = 3, slots: int = 512, shared: int = 0
    ) -> None:
        self.tripwire, initial = tripwire, SHARED if shared else PRIVATE
        self.memory, self.pinned, self.slot_count = memory, pinned, slots
        self.vm = FakeVm(slots)
        self.resources = ExitStack()
        self.backings = {
            state: self.resources.enter_context(Backing(state.value, memory * PAGE_SIZE)) for state in PageState
        }
        self.quiesced = 0
        self.inside = False
        try:
            self.protection: EmulatedProtection[FakeMemfd] = EmulatedProtection(
                self.vm,
                self.backings,
                pinned=pages(0, pinned),
                c_bit=C_BIT,
                tripwire=tripwire,
                slot_count=slots,
                quiesce=self.quiesce,
                initial=initial,
            )
        except HostError:
            self.close()
            raise
        self.resources.callback(self.protection.close)
        self.model = [PRIVATE] * pinned + [initial] * (memory - pinned)
        """What each page was converted to last."""

    @contextmanager
    def quiesce(self) -> Iterator[None]:
        assert not self.inside
        self.inside = True
        self.quiesced += 1
        try:
            yield
        finally:
            self.inside = False

    def apply(self, start: int, end: int, to: PageState) -> FailureKind | None:
        """Convert pages, take what the result says into the model, and return its failure."""
        range_ = pages(start, end)
        applied = self.protection.apply(range_, to)
        assert range_.start <= applied.end <= range_.end
        assert not self.inside
        done = applied.end // PAGE_SIZE
        self.model[start:done] = [to] * (done - start)
        if applied.failure is None:
            assert done == end
            return None
        assert applied.failure.message
        return applied.failure.kind

    def found(self, page: int, view: PageState) -> str:
        """Return what the guest finds in a view of the page; ``live`` is checked to be the view's own memory."""
        gpa = page * PAGE_SIZE
        address = gpa | (1 << C_BIT if view is PRIVATE else 0)
        slot = self.vm.slot_at(address)
        if slot is None:
            return "hole"
        if slot.is_tripwire:
            # Nothing may ever reach memory through a tripwire, not even KVM's own emulation.
            inaccessible = self.protection._inaccessible
            assert slot.userspace_addr == inaccessible
            assert slot.size_bytes <= self.protection._inaccessible_bytes
            return "tripwire"
        assert slot.memfd is None, "a guest_memfd that is still open"
        assert slot.userspace_addr + (address - slot.gpa) == self.backings[view].address_of(gpa)
        return "live"

    def check(self) -> None:
        """Assert that exactly the live view of each page is live, and that no memslot is lost."""
        self.check_safe()
        dead = "tripwire" if self.tripwire is Tripwire.GUEST_MEMFD else "hole"
        for page, live in enumerate(self.model):
            assert self.found(page, live) == "live", (page, live)
            assert self.found(page, live.opposite) == dead, (page, live)
        views = 2 if self.tripwire is Tripwire.GUEST_MEMFD else 1
        assert len(self.vm.slots) == (1 + len(self.protection.pieces)) * views

    def check_safe(self) -> None:
        """Assert what holds after any failure, too: never both views of a page, and no slot lost."""
        for page, live in enumerate(self.model):
            views = {view: self.found(page, view) for view in PageState}
            assert list(views.values()).count("live") <= 1, (page, views)
            assert views[live.opposite] != "live", (page, views)
        assert all(memfd.closed for memfd in self.vm.memfds)
        held = [number for piece in self.protection.pieces for number in piece.slots.values() if number is not None]
        assert len(set(held)) == len(held)
        free = set(self.protection._free)
        assert len(free) == self.protection.free_slots
        assert free.isdisjoint(self.vm.slots)
        assert set(held) <= set(self.vm.slots)
        assert len(free) + len(self.vm.slots) == self.slot_count

    def close(self) -> None:
        self.resources.close()


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulated, "BLOCK_BYTES", BLOCK * PAGE_SIZE)


@pytest.fixture(params=BY_SLOTS, ids=lambda tripwire: str(tripwire.value))
def tripwire(request: pytest.FixtureRequest) -> Tripwire:
    found = request.param
    assert isinstance(found, Tripwire)
    return found


@pytest.fixture
def make(tripwire: Tripwire) -> Iterator[Callable[..., Rig]]:
    with ExitStack() as stack:

        def build(**kwargs: int) -> Rig:
            rig = Rig(tripwire, **kwargs)
            stack.callback(rig.close)
            return rig

        yield build


class Conversions(RuleBasedStateMachine):
    """Any conversions in any order, with slots in plenty or scarce."""

    @initialize(
        tripwire=st.sampled_from(BY_SLOTS), spare=st.sampled_from([0, 2, 5, 9, 500]), pinned=st.sampled_from([1, 3, 8])
    )
    def build(self, tripwire: Tripwire, spare: int, pinned: int) -> None:
        probe = Rig(tripwire, pinned=pinned)
        used = len(probe.vm.slots)
        probe.close()
        self.rig = Rig(tripwire, pinned=pinned, slots=used + spare)
        self.plenty = spare == 500

    @rule(start=st.integers(0, 39), size=st.integers(1, 40), to=st.sampled_from(PageState))
    def convert(self, start: int, size: int, to: PageState) -> None:
        rig = self.rig
        start = max(start, rig.pinned)
        end = min(start + size, rig.memory)
        before = list(rig.model)
        boundaries = {0} | {(piece.start // PAGE_SIZE) for piece in rig.protection.pieces} | {rig.memory}
        moving = [page for page in range(start, end) if before[page] is not to]
        needs_cut = any(
            (page == edge and edge not in boundaries) or (page + 1 == edge and edge not in boundaries)
            for page in moving
            for edge in (start, end)
        )
        quiesced = rig.quiesced
        failure = rig.apply(start, end, to)
        if self.plenty:
            assert failure is None
        assert failure in {None, FailureKind.SLOTS}
        if not needs_cut:
            # Whole pieces are swapped: no vCPU has to leave the guest for that.
            assert failure is None
            assert rig.quiesced == quiesced
        elif failure is None:
            assert rig.quiesced > quiesced

    @precondition(lambda self: hasattr(self, "rig"))
    @invariant()
    def one_view_is_live(self) -> None:
        self.rig.check()

    def teardown(self) -> None:
        if hasattr(self, "rig"):
            self.rig.close()


TestConversions = Conversions.TestCase
TestConversions.settings = settings(max_examples=100, stateful_step_count=15, deadline=None)


def test_all_memory_starts_private_and_is_never_swapped_for_that(make: Callable[..., Rig]) -> None:
    rig = make()
    rig.check()
    assert rig.protection.apply(pages(3, 40), PRIVATE).end == 40 * PAGE_SIZE
    assert (rig.protection.cuts, rig.protection.merges, rig.quiesced) == (0, 0, 0)


def test_memory_may_start_shared_but_for_what_is_pinned(make: Callable[..., Rig]) -> None:
    rig = make(shared=1)
    rig.check()
    assert rig.apply(9, 10, PRIVATE) is None
    rig.check()


def test_a_slot_that_kvm_refused_is_a_diagnosis(make: Callable[..., Rig]) -> None:
    rig = make()
    rig.apply(9, 10, SHARED)
    # The page's own memory cannot be had, and neither can what was there before.
    rig.vm.fail_next(4 if rig.tripwire is Tripwire.GUEST_MEMFD else 2, errno.ENOMEM, times=20)
    assert rig.apply(9, 10, PRIVATE) is FailureKind.REFUSED
    assert "KVM refused" in rig.protection.diagnose(pages(9, 10), SHARED)
    assert rig.protection.diagnose(pages(10, 11), PRIVATE) == ""


def test_whole_pieces_are_swapped_under_running_vcpus(make: Callable[..., Rig]) -> None:
    rig = make()
    assert rig.apply(8, 40, SHARED) is None
    rig.check()
    assert (rig.quiesced, rig.protection.cuts) == (0, 0)


def test_no_call_is_made_outside_of_quiesce_for_a_cut(
    make: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make()
    inside: list[bool] = []
    enter = rig.vm._enter

    def spy(operation: str) -> None:
        inside.append(rig.inside)
        enter(operation)

    monkeypatch.setattr(rig.vm, "_enter", spy)
    assert rig.apply(9, 10, SHARED) is None
    assert inside
    assert all(inside)
    inside.clear()
    assert rig.apply(9, 10, PRIVATE) is None
    assert inside
    assert not any(inside)
    assert rig.quiesced == rig.protection.cuts == 1


def test_a_dead_view_is_dead_before_the_other_one_lives(
    make: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make()
    rig.apply(9, 10, SHARED)
    enter = rig.vm._enter
    seen: set[tuple[str, str]] = set()

    def look(operation: str) -> None:
        views = (rig.vm.access(9 * PAGE_SIZE | 1 << C_BIT), rig.vm.access(9 * PAGE_SIZE))
        seen.add(views)
        assert views != ("live", "live")
        # Others look at their own pages meanwhile.
        assert all(rig.found(page, PRIVATE) == "live" for page in range(rig.memory) if page != 9)
        enter(operation)

    monkeypatch.setattr(rig.vm, "_enter", look)
    assert rig.apply(9, 10, PRIVATE) is None
    assert len(seen) > 1


def test_pinned_memory_keeps_its_slots(make: Callable[..., Rig]) -> None:
    rig = make()
    before = [rig.vm.slot_at(view) for view in (0, 1 << C_BIT)]
    moves = random.Random(39)  # noqa: S311  reproducible, no secret
    for _ in range(60):
        start = moves.randrange(3, 40)
        assert rig.apply(start, moves.randrange(start, 40) + 1, moves.choice([PRIVATE, SHARED])) is None
    assert [rig.vm.slot_at(view) for view in (0, 1 << C_BIT)] == before
    rig.check()


# -- out of memslots -----------------------------------------------------------------------------------------


def test_no_slot_left_changes_nothing_and_says_so(make: Callable[..., Rig]) -> None:
    # All blocks, the pinned piece, and one slot too few for any cut.
    views = 2 if make().tripwire is Tripwire.GUEST_MEMFD else 1
    rig = make(slots=6 * views + views - 1)
    assert rig.protection.free_slots == views - 1
    calls = rig.vm.calls
    applied = rig.protection.apply(pages(9, 10), SHARED)
    assert applied.failure is not None
    assert applied.failure.kind is FailureKind.SLOTS
    assert "none can be merged" in applied.failure.message
    assert applied.end == 9 * PAGE_SIZE
    assert rig.vm.calls == calls
    rig.check()
    assert rig.apply(8, 16, SHARED) is None, "a whole piece needs no more slots"
    rig.check()


def test_what_came_before_the_shortage_stays(make: Callable[..., Rig]) -> None:
    views = 2 if make().tripwire is Tripwire.GUEST_MEMFD else 1
    rig = make(slots=6 * views)
    assert rig.apply(8, 28, SHARED) is FailureKind.SLOTS
    assert rig.model == [PRIVATE] * 8 + [SHARED] * 16 + [PRIVATE] * 16
    rig.check()


def test_merging_wins_slots_back(make: Callable[..., Rig]) -> None:
    views = 2 if make().tripwire is Tripwire.GUEST_MEMFD else 1
    rig = make(slots=6 * views + 3 * views)
    for block in (8, 16, 24, 32):
        for to in (SHARED, PRIVATE):
            assert rig.apply(block + 2, block + 3, to) is None, block
            rig.check()
    assert rig.protection.cuts == 4
    assert rig.protection.merges == 3


def test_without_shortage_nothing_is_merged(make: Callable[..., Rig]) -> None:
    rig = make()
    for to in (SHARED, PRIVATE):
        rig.apply(10, 11, to)
    assert rig.protection.merges == 0
    assert len(rig.protection.pieces) == 7


def test_pieces_that_were_merged_under_way_are_converted_as_what_they_are_now(make: Callable[..., Rig]) -> None:
    # The cut of [31, 32) needs one more piece. Merging wins it, by joining [32, 33) with what comes after it; and that
    # is what the same request is to convert next.
    views = 2 if make().tripwire is Tripwire.GUEST_MEMFD else 1
    rig = make(slots=(6 + 2) * views)
    for to in (SHARED, PRIVATE):
        assert rig.apply(33, 34, to) is None
    assert rig.protection.free_slots == 0
    assert rig.apply(31, 33, SHARED) is None
    assert rig.protection.merges == 1
    rig.check()


# -- failures of KVM -----------------------------------------------------------------------------------------


SCRIPT = [(9, 10, SHARED), (8, 24, SHARED), (10, 30, PRIVATE), (12, 13, SHARED), (3, 40, SHARED), (9, 10, PRIVATE)]
"""Swaps, cuts, and (with few slots) merges."""


def calls_of_script(make: Callable[..., Rig], **kwargs: int) -> int:
    rig = make(**kwargs)
    before = rig.vm.calls
    for start, end, to in SCRIPT:
        rig.apply(start, end, to)
    return rig.vm.calls - before


@pytest.mark.parametrize("times", [1, 2, 3, 7, 10_000])
@pytest.mark.parametrize("scarce", [False, True])
def test_any_call_may_fail(make: Callable[..., Rig], times: int, scarce: bool) -> None:  # noqa: FBT001  a parameter
    views = 2 if make().tripwire is Tripwire.GUEST_MEMFD else 1
    slots = 10 * views if scarce else 512
    for nth in range(1, calls_of_script(make, slots=slots) + 1):
        rig = make(slots=slots)
        rig.vm.fail_next(nth, errno.ENOMEM, times=times)
        failed = False
        for start, end, to in SCRIPT:
            before = list(rig.model)
            kind = rig.apply(start, end, to)
            rig.check_safe()
            if kind is not FailureKind.REFUSED:
                assert scarce or kind is None
                continue
            failed = True
            if times == 1:
                # KVM failed once, so everything but what was being changed is as it was.
                touched = set(range(start, end)) | cut_with(start, end)
                assert all(
                    rig.found(page, rig.model[page]) == "live" for page in range(rig.memory) if page not in touched
                ), (nth, start, end)
                assert rig.model[:start] == before[:start]
                assert rig.model[end:] == before[end:]
        assert failed or scarce, nth
        rig.vm.fail_next(1, 0, times=0)
        # A later try succeeds, and every page that is converted both ways is in order again.
        assert rig.apply(3, 40, SHARED) is None
        assert rig.apply(3, 40, PRIVATE) is None
        rig.check()
        rig.close()


def cut_with(start: int, end: int) -> set[int]:
    """Return the pages of the blocks that hold an edge of the range: a cut moves all of their piece."""
    return {
        page for edge in (start, end - 1) for page in range(edge // BLOCK * BLOCK, min((edge // BLOCK + 1) * BLOCK, 40))
    }


@pytest.mark.parametrize("nth", range(1, 5))
def test_a_swap_that_failed_once_is_undone(make: Callable[..., Rig], nth: int) -> None:
    rig = make()
    rig.apply(9, 10, SHARED)
    rig.vm.fail_next(nth, errno.ENOMEM)
    kind = rig.apply(9, 10, PRIVATE)
    rig.vm.fail_next(1, 0, times=0)
    if kind is not None:
        assert kind is FailureKind.REFUSED
        assert rig.model[9] is SHARED
    rig.check()
    assert rig.apply(9, 10, PRIVATE) is None
    rig.check()


def test_a_cut_that_failed_once_is_undone(make: Callable[..., Rig]) -> None:
    nth = 0
    kind: FailureKind | None = FailureKind.REFUSED
    while kind is not None:
        nth += 1
        rig = make()
        rig.vm.fail_next(nth, errno.ENOMEM)
        kind = rig.apply(9, 10, SHARED)
        rig.vm.fail_next(1, 0, times=0)
        rig.check()
        assert (len(rig.protection.pieces) == 5) == (kind is not None)
    assert nth > 4


def test_a_failure_says_what_kvm_said(make: Callable[..., Rig]) -> None:
    rig = make()
    # With guest_memfds, the first call makes one.
    rig.vm.fail_next(2 if rig.tripwire is Tripwire.GUEST_MEMFD else 1, errno.ENOMEM)
    failure = rig.protection.apply(pages(8, 16), SHARED).failure
    assert failure is not None
    assert "cannot delete memslot" in failure.message
    assert "Cannot allocate memory" in failure.message


def test_vcpus_that_do_not_come_out_leave_all_as_it_was(make: Callable[..., Rig]) -> None:
    rig = make()

    def stuck() -> AbstractContextManager[None]:
        raise BackendError("vCPU 0 did not leave")

    rig.protection._quiesce = stuck
    assert rig.apply(9, 10, SHARED) is FailureKind.REFUSED
    rig.check()


# -- setting up ----------------------------------------------------------------------------------------------


def test_a_machine_that_kvm_refuses_is_a_host_error_and_leaves_nothing(tripwire: Tripwire) -> None:
    with pytest.raises(HostError, match="cannot set up 5 blocks of guest memory: no memslot is left: ask for less"):
        Rig(tripwire, slots=4)


def test_all_memory_pinned(make: Callable[..., Rig]) -> None:
    rig = make(memory=8, pinned=8)
    rig.check()
    assert len(rig.protection.pieces) == 0


def test_a_terabyte_is_a_bounded_number_of_blocks(tripwire: Tripwire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert emulated.BLOCK_BYTES == 2 * MIB
    vm = FakeVm(32764)
    with Backing("private", TIB) as private, Backing("shared", TIB) as shared:
        protection = EmulatedProtection(
            vm,
            {PRIVATE: private, SHARED: shared},
            pinned=GpaRange(0, 4 * MIB),
            c_bit=C_BIT,
            tripwire=tripwire,
            slot_count=32764,
            quiesce=nullcontext,
        )
        assert MOST_BLOCKS / 2 <= len(protection.pieces) <= MOST_BLOCKS
        assert protection.free_slots > 32764 // 2
        # One page in the middle: the cut is to fine pieces first, and no memory is touched.
        gpa = TIB // 2 + 5 * MIB + PAGE_SIZE
        assert protection.apply(GpaRange.of_size(gpa, PAGE_SIZE), SHARED).failure is None
        assert vm.access(gpa) == "live"
        assert vm.access(gpa | 1 << C_BIT) != "live"
        assert protection.pieces.at(gpa - PAGE_SIZE).start == TIB // 2 + 4 * MIB
        assert protection.pieces.at(gpa + PAGE_SIZE).end == TIB // 2 + 6 * MIB
        assert private.held_bytes() == shared.held_bytes() == 0
        protection.close()
        protection.close()


# -- what the service asks of it -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpa", "plain", "view"),
    [
        (0x1234, 0x1234, SHARED),
        (1 << C_BIT | 0x1234, 0x1234, PRIVATE),
        (40 * PAGE_SIZE - 1, 40 * PAGE_SIZE - 1, SHARED),
        (40 * PAGE_SIZE, 40 * PAGE_SIZE, None),
        (1 << C_BIT | 40 * PAGE_SIZE, 40 * PAGE_SIZE, None),
    ],
)
def test_the_c_bit_tells_the_view(make: Callable[..., Rig], gpa: int, plain: int, view: PageState | None) -> None:
    protection: Protection = make().protection
    assert protection.locate(gpa) == (plain, view)


@pytest.mark.parametrize("private", [False, True])
def test_a_fault_wants_what_its_c_bit_says_not_its_flags(make: Callable[..., Rig], private: bool) -> None:  # noqa: FBT001  a parameter
    protection = make().protection
    assert protection.wanted(MemoryFault(1 << C_BIT | 0x5000, 0x1000, private)) == (0x5000, PRIVATE)
    assert protection.wanted(MemoryFault(0x5000, 0x1000, private)) == (0x5000, SHARED)


def test_an_access_goes_to_the_side_it_names(make: Callable[..., Rig]) -> None:
    protection = make().protection
    assert protection.access(SHARED, MmioAccess(0x5008, 4, b"abcd")) == b""
    assert protection.access(SHARED, MmioAccess(0x5006, 8, None)) == b"\0\0abcd\0\0"
    assert protection.access(PRIVATE, MmioAccess(0x5006, 8, None)) == bytes(8)


def test_a_discard_empties_one_side_alone(make: Callable[..., Rig]) -> None:
    rig = make()
    for backing in rig.backings.values():
        backing.write(0x5000, b"secret")
    rig.protection.discard(pages(5, 6), SHARED)
    assert rig.backings[SHARED].read(0x5000, 6) == bytes(6)
    assert rig.backings[PRIVATE].read(0x5000, 6) == b"secret"


def test_the_facts_say_what_the_machine_has(make: Callable[..., Rig]) -> None:
    rig = make()
    assert rig.protection.facts() == {
        "protection": "emulated",
        "tripwire": rig.tripwire.value,
        "c_bit": C_BIT,
        "block_bytes": BLOCK * PAGE_SIZE,
        "memslots_free": rig.protection.free_slots,
    }
