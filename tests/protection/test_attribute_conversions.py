"""Conversions by attributes, of both protections: what the guest finds after any of them, failed ones too."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvmd.conversion.changes import FailureKind
from kvmd.errors import BackendError
from kvmd.memory.backing import Backing
from kvmd.ranges import GpaRange, PageState
from kvmd.units import PAGE_SIZE
from tests.protection.attribute_rig import KINDS, MEMORY, PINNED, PRIVATE, SHARED, Rig, pages

pytestmark = pytest.mark.usefixtures("_small_slots")


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
