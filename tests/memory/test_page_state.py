from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import groupby, pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvmd.memory.page_state import PageStateMap, Segment
from kvmd.ranges import GpaRange, PageState
from kvmd.units import KIB, MIB, PAGE_SIZE, TIB

PAGES = 24
PRIVATE, SHARED = PageState.PRIVATE, PageState.SHARED


def pages(start: int, end: int) -> GpaRange:
    return GpaRange(start * PAGE_SIZE, end * PAGE_SIZE)


def numbers(range_: GpaRange) -> range:
    return range(range_.start // PAGE_SIZE, range_.end // PAGE_SIZE)


ranges = st.lists(st.integers(0, PAGES), min_size=2, max_size=2, unique=True).map(lambda ends: pages(*sorted(ends)))
states = st.sampled_from(PageState)


@dataclass(frozen=True)
class Page:
    """What the map says of one page."""

    state: PageState
    generation: int = 0
    explicit: int = 0

    @property
    def is_explicit(self) -> bool:
        return 0 < self.generation == self.explicit


class AgainstADictOfPages(RuleBasedStateMachine):
    @initialize(initial=states)
    def build(self, initial: PageState) -> None:
        self.subject = PageStateMap(PAGES * PAGE_SIZE, initial)
        self.model = {number: Page(initial) for number in range(PAGES)}
        self.generation = 0

    @rule(range_=ranges, to=states, explicit=st.booleans())
    def set(self, range_: GpaRange, to: PageState, explicit: bool) -> None:  # noqa: FBT001  drawn by hypothesis
        self.generation += 1
        self.subject.set(range_, to, self.generation, explicit=explicit)
        # An implicit conversion keeps the newest explicit one of its pages.
        last = self.generation if explicit else max(self.model[number].explicit for number in numbers(range_))
        self.model.update({number: Page(to, self.generation, last) for number in numbers(range_)})

    @rule()
    def compact(self) -> None:
        before = len(self.subject)
        self.subject.compact()
        model: dict[int, Page] = {}
        runs = 0
        # Neighbours in one state, by one cause: the highest generations are everybody's.
        for _, group in groupby(self.model.items(), key=lambda item: (item[1].state, item[1].is_explicit)):
            run = list(group)
            runs += 1
            merged = Page(
                run[0][1].state,
                max(page.generation for _, page in run),
                max(page.explicit for _, page in run),
            )
            model.update({number: merged for number, _ in run})
        assert len(self.subject) == runs <= before
        self.model = model

    @rule(gpa=st.integers(0, PAGES * PAGE_SIZE - 1))
    def segment_at(self, gpa: int) -> None:
        segment = self.subject.segment_at(gpa)
        assert segment.range.start <= gpa < segment.range.end
        assert segment in list(self.subject.segments())

    @rule(within=ranges)
    def segments(self, within: GpaRange) -> None:
        found = list(self.subject.segments(within))
        assert (found[0].range.start, found[-1].range.end) == (within.start, within.end)
        self.check_segments(found)

    @rule(range_=ranges)
    def state_of(self, range_: GpaRange) -> None:
        found = {self.model[number].state for number in numbers(range_)}
        assert self.subject.state_of(range_) is (found.pop() if len(found) == 1 else None)

    @rule(within=ranges, state=states)
    def first_in_state(self, within: GpaRange, state: PageState) -> None:
        expected = [number for number in numbers(within) if self.model[number].state is state]
        assert self.subject.first_in_state(state, within) == (expected[0] * PAGE_SIZE if expected else None)

    @rule(within=ranges, state=states)
    def end_in_state(self, within: GpaRange, state: PageState) -> None:
        expected = [number for number in numbers(within) if self.model[number].state is state]
        assert self.subject.end_in_state(state, within) == (
            (expected[-1] + 1) * PAGE_SIZE if expected else within.start
        )

    @precondition(lambda self: hasattr(self, "subject"))
    @invariant()
    def all_pages_are_as_in_the_model(self) -> None:
        found = list(self.subject.segments())
        assert len(found) == len(self.subject)
        assert (found[0].range.start, found[-1].range.end) == (0, PAGES * PAGE_SIZE)
        self.check_segments(found)

    @precondition(lambda self: hasattr(self, "subject"))
    @invariant()
    def coalesced_is_the_fewest_ranges(self) -> None:
        found = self.subject.coalesced()
        assert found[0][0].start == 0
        assert found[-1][0].end == PAGES * PAGE_SIZE
        assert all(left.end == right.start and one is not other for (left, one), (right, other) in pairwise(found))
        for range_, state in found:
            assert {self.model[number].state for number in numbers(range_)} == {state}

    def check_segments(self, found: list[Segment]) -> None:
        """Assert order, no gap, no empty segment (GpaRange refuses those), and the model's pages."""
        assert all(left.range.end == right.range.start for left, right in pairwise(found))
        for segment in found:
            for number in numbers(segment.range):
                page = self.model[number]
                assert (segment.state, segment.generation, segment.explicit_generation) == (
                    page.state,
                    page.generation,
                    page.explicit,
                )
                assert segment.is_explicit == page.is_explicit


TestAgainstADictOfPages = AgainstADictOfPages.TestCase
TestAgainstADictOfPages.settings = settings(max_examples=100, stateful_step_count=25, deadline=None)


@pytest.fixture
def subject() -> PageStateMap:
    return PageStateMap(PAGES * PAGE_SIZE, PRIVATE)


@pytest.mark.parametrize("gpa", [-1, PAGES * PAGE_SIZE, 1 << 60])
def test_an_address_outside_memory_is_in_no_segment(subject: PageStateMap, gpa: int) -> None:
    with pytest.raises(IndexError, match="is outside memory"):
        subject.segment_at(gpa)


@pytest.mark.parametrize("range_", [pages(PAGES - 1, PAGES + 1), pages(PAGES, PAGES + 1), pages(0, 1 << 30)])
def test_a_conversion_outside_memory_is_refused_and_changes_nothing(subject: PageStateMap, range_: GpaRange) -> None:
    with pytest.raises(IndexError, match="is outside memory"):
        subject.set(range_, SHARED, 1, explicit=True)
    assert list(subject.segments()) == [Segment(pages(0, PAGES), PRIVATE, 0, 0)]


@pytest.mark.parametrize("size", [0, -PAGE_SIZE, 100])
def test_memory_is_whole_pages(size: int) -> None:
    with pytest.raises(ValueError, match=r"is empty or not|is not aligned"):
        PageStateMap(size, PRIVATE)


def test_an_implicit_conversion_leaves_older_faults_stale(subject: PageStateMap) -> None:
    subject.set(pages(2, 4), SHARED, 5, explicit=True)
    subject.set(pages(2, 3), PRIVATE, 6, explicit=False)
    assert subject.segment_at(2 * PAGE_SIZE) == Segment(pages(2, 3), PRIVATE, 6, 5)
    assert subject.segment_at(3 * PAGE_SIZE) == Segment(pages(3, 4), SHARED, 5, 5)


def test_nothing_that_was_never_converted_counts_as_explicit(subject: PageStateMap) -> None:
    assert not subject.segment_at(0).is_explicit
    subject.set(pages(0, 1), SHARED, 1, explicit=False)
    assert not subject.segment_at(0).is_explicit
    subject.set(pages(0, 1), PRIVATE, 2, explicit=True)
    assert subject.segment_at(0).is_explicit


def test_a_terabyte_costs_nothing_until_it_converts() -> None:
    subject = PageStateMap(TIB, PRIVATE)
    assert len(subject) == 1
    middle = TIB // 2
    for generation, offset in enumerate(range(0, 100 * MIB, MIB), start=1):
        subject.set(GpaRange.of_size(middle + offset, PAGE_SIZE), SHARED, generation, explicit=False)
    assert len(subject) == 201
    columns = (subject._starts, subject._states, subject._generations, subject._explicit)
    assert sum(sys.getsizeof(column) for column in columns) < 16 * KIB
    assert subject.first_in_state(SHARED, GpaRange(0, TIB)) == middle
    assert subject.end_in_state(SHARED, GpaRange(0, TIB)) == middle + 99 * MIB + PAGE_SIZE
    subject.set(GpaRange(0, TIB), PRIVATE, 1000, explicit=True)
    assert list(subject.segments()) == [Segment(GpaRange(0, TIB), PRIVATE, 1000, 1000)]


def test_runs_join_what_was_converted_at_different_times() -> None:
    state = PageStateMap(8 * PAGE_SIZE, PageState.PRIVATE)
    state.set(GpaRange(PAGE_SIZE, 3 * PAGE_SIZE), PageState.SHARED, 1, explicit=True)
    state.set(GpaRange(3 * PAGE_SIZE, 4 * PAGE_SIZE), PageState.SHARED, 2, explicit=False)
    state.set(GpaRange(6 * PAGE_SIZE, 8 * PAGE_SIZE), PageState.SHARED, 3, explicit=False)
    assert list(state.runs(PageState.SHARED)) == [
        GpaRange(PAGE_SIZE, 4 * PAGE_SIZE),
        GpaRange(6 * PAGE_SIZE, 8 * PAGE_SIZE),
    ]
    within = GpaRange(2 * PAGE_SIZE, 7 * PAGE_SIZE)
    assert list(state.runs(PageState.SHARED, within)) == [
        GpaRange(2 * PAGE_SIZE, 4 * PAGE_SIZE),
        GpaRange(6 * PAGE_SIZE, 7 * PAGE_SIZE),
    ]
    assert list(state.runs(PageState.PRIVATE, within)) == [GpaRange(4 * PAGE_SIZE, 6 * PAGE_SIZE)]
    assert list(state.runs(PageState.PRIVATE, GpaRange(PAGE_SIZE, 2 * PAGE_SIZE))) == []
