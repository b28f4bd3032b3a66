from __future__ import annotations

from itertools import pairwise

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvmd.memory.range_set import RangeSet
from kvmd.ranges import GpaRange
from kvmd.units import PAGE_SIZE

PAGES = 24


def pages(start: int, end: int) -> GpaRange:
    return GpaRange(start * PAGE_SIZE, end * PAGE_SIZE)


def pages_of(range_: GpaRange) -> set[int]:
    return set(range(range_.start // PAGE_SIZE, range_.end // PAGE_SIZE))


ranges = st.lists(st.integers(0, PAGES), min_size=2, max_size=2, unique=True).map(lambda ends: pages(*sorted(ends)))


class AgainstASetOfPages(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.subject = RangeSet()
        self.model: set[int] = set()

    @rule(range_=ranges)
    def add(self, range_: GpaRange) -> None:
        self.subject.add(range_)
        self.model |= pages_of(range_)

    @rule(range_=ranges)
    def remove(self, range_: GpaRange) -> None:
        self.subject.remove(range_)
        self.model -= pages_of(range_)

    @rule(range_=ranges)
    def within(self, range_: GpaRange) -> None:
        parts = self.subject.within(range_)
        assert all(range_.contains(part) for part in parts)
        assert list(parts) == sorted(parts)
        assert sum(part.pages for part in parts) == len(self.model & pages_of(range_))
        assert set().union(*map(pages_of, parts)) == self.model & pages_of(range_)

    @invariant()
    def it_is_the_fewest_ranges_of_just_these_pages(self) -> None:
        found = list(self.subject)
        assert set().union(*map(pages_of, found)) == self.model
        assert all(left.end < right.start for left, right in pairwise(found))
        assert self.subject.size_bytes == len(self.model) * PAGE_SIZE
        assert bool(self.subject) == bool(self.model)


TestAgainstASetOfPages = AgainstASetOfPages.TestCase
TestAgainstASetOfPages.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)


def test_a_set_may_change_under_an_iteration() -> None:
    subject = RangeSet()
    subject.add(pages(0, 2))
    subject.add(pages(4, 6))
    for range_ in subject:
        subject.remove(range_)
    assert not subject
    assert subject.within(pages(0, 10)) == ()
