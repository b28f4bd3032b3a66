from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmd.conversion.hottest import HotRange, HottestRanges
from kvmd.units import PAGE_SIZE

pages = st.lists(st.integers(0, 20), max_size=300)


def counted(stream: list[int], capacity: int) -> HottestRanges:
    hottest = HottestRanges(capacity)
    for page in stream:
        hottest.add(page * PAGE_SIZE, PAGE_SIZE)
    return hottest


@given(pages, st.integers(1, 8))
def test_the_bounds_of_space_saving_hold(stream: list[int], capacity: int) -> None:
    exact = Counter(stream)
    top = counted(stream, capacity).top(capacity + 1)
    assert len(top) == min(capacity, len(exact))
    assert sum(hot.count for hot in top) == len(stream)
    for hot in top:
        true = exact[hot.gpa // PAGE_SIZE]
        assert true <= hot.count <= true + hot.overcount
        assert hot.overcount <= len(stream) / capacity
    listed = {hot.gpa // PAGE_SIZE for hot in top}
    assert {page for page, count in exact.items() if count > len(stream) / capacity} <= listed


@given(pages)
def test_counts_are_exact_while_all_ranges_fit(stream: list[int]) -> None:
    expected = sorted(Counter(stream).items(), key=lambda item: (-item[1], item[0]))
    top = counted(stream, 21).top(100)
    assert [(hot.gpa // PAGE_SIZE, hot.count, hot.overcount) for hot in top] == [
        (page, count, 0) for page, count in expected
    ]


def test_ranges_of_another_size_are_counted_apart() -> None:
    hottest = HottestRanges()
    hottest.add(0x1000, PAGE_SIZE)
    hottest.add(0x1000, 2 * PAGE_SIZE)
    hottest.add(0x1000, 2 * PAGE_SIZE)
    assert hottest.top(2) == (
        HotRange(0x1000, 2 * PAGE_SIZE, 2, 0),
        HotRange(0x1000, PAGE_SIZE, 1, 0),
    )


def test_top_gives_no_more_than_asked() -> None:
    assert [hot.gpa for hot in counted([3, 1, 1, 2, 2, 2], 8).top(2)] == [2 * PAGE_SIZE, PAGE_SIZE]


def test_no_counter_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        HottestRanges(0)
