from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmd.ranges import GPA_LIMIT, GpaRange, PageState
from kvmd.units import PAGE_SIZE


def pages(start: int, end: int) -> GpaRange:
    return GpaRange(start * PAGE_SIZE, end * PAGE_SIZE)


def numbers(range_: GpaRange) -> set[int]:
    return set(range(range_.start // PAGE_SIZE, range_.end // PAGE_SIZE))


ranges = st.lists(st.integers(0, 12), min_size=2, max_size=2, unique=True).map(lambda ends: pages(*sorted(ends)))


def test_the_states_are_each_other_s_opposite() -> None:
    assert {state: state.opposite for state in PageState} == {
        PageState.PRIVATE: PageState.SHARED,
        PageState.SHARED: PageState.PRIVATE,
    }


@pytest.mark.parametrize(("start", "end"), [(0, PAGE_SIZE), (0, GPA_LIMIT), (GPA_LIMIT - PAGE_SIZE, GPA_LIMIT)])
def test_a_range_may_reach_from_end_to_end(start: int, end: int) -> None:
    assert GpaRange(start, end).size_bytes == end - start
    assert GpaRange.of_size(start, end - start) == GpaRange(start, end)


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (0, 0),
        (PAGE_SIZE, PAGE_SIZE),
        (2 * PAGE_SIZE, PAGE_SIZE),
        (-PAGE_SIZE, PAGE_SIZE),
        (0, GPA_LIMIT + PAGE_SIZE),
        (GPA_LIMIT, GPA_LIMIT + PAGE_SIZE),
        (0, 1 << 64),
    ],
)
def test_an_empty_or_impossible_range_is_refused(start: int, end: int) -> None:
    with pytest.raises(ValueError, match="is empty or not within"):
        GpaRange(start, end)


@pytest.mark.parametrize(("start", "end"), [(1, PAGE_SIZE), (0, PAGE_SIZE + 1), (0x800, 0x1800), (0, 1)])
def test_an_unaligned_range_is_refused(start: int, end: int) -> None:
    with pytest.raises(ValueError, match="is not aligned to 4096 bytes"):
        GpaRange(start, end)


@pytest.mark.parametrize("size", [0, -PAGE_SIZE, (1 << 64) - PAGE_SIZE])
def test_a_size_cannot_wrap(size: int) -> None:
    with pytest.raises(ValueError, match="is empty or not within"):
        GpaRange.of_size(PAGE_SIZE, size)


@given(left=ranges, right=ranges)
def test_two_ranges_relate_as_their_pages_do(left: GpaRange, right: GpaRange) -> None:
    one, other = numbers(left), numbers(right)
    assert left.pages == len(one)
    assert left.size_bytes == len(one) * PAGE_SIZE
    assert left.overlaps(right) == right.overlaps(left) == bool(one & other)
    assert left.contains(right) == (other <= one)
    union = one | other
    assert left.touches(right) == right.touches(left) == (len(union) == max(union) - min(union) + 1)
    assert (left == right) == (one == other)
    assert (left < right) == ((min(one), max(one)) < (min(other), max(other)))


def test_a_range_is_written_half_open_and_does_not_change() -> None:
    range_ = GpaRange(0x1000, 0x3000)
    assert str(range_) == "[0x1000, 0x3000)"
    with pytest.raises(AttributeError):
        range_.start = 0  # type: ignore[misc]  # what the test is about
    assert len({range_, GpaRange(0x1000, 0x3000)}) == 1
