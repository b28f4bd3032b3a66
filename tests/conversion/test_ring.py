from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmd.conversion.messages import Cause, Outcome
from kvmd.conversion.record import ConversionRecord
from kvmd.conversion.ring import RecordRing
from kvmd.ranges import PageState


def record(sequence: int) -> ConversionRecord:
    return ConversionRecord(
        sequence, 0, 0, 0, Cause.IMPLICIT, 0, 4096, None, PageState.SHARED, Outcome.CONVERTED, 1, 0, 0, 0
    )


def fill(ring: RecordRing, count: int) -> None:
    for _ in range(count):
        ring.append(record(ring.appended + 1))


actions = st.lists(
    st.one_of(st.tuples(st.just("append"), st.integers(0, 25)), st.tuples(st.just("take"), st.integers(1, 25))),
    max_size=40,
)


@given(actions, st.integers(1, 9))
def test_a_reader_gets_every_record_in_order_or_a_count_of_those_lost(
    script: list[tuple[str, int]], capacity: int
) -> None:
    ring = RecordRing(capacity)
    reader = ring.reader()
    seen = 0
    for action, number in script:
        if action == "append":
            fill(ring, number)
            continue
        lost, records = reader.take(number)
        kept = deque(range(seen + 1, ring.appended + 1), maxlen=capacity)
        assert lost == ring.appended - seen - len(kept)
        assert [entry.sequence for entry in records] == list(kept)[:number]
        seen += lost + len(records)
        assert reader.unread == ring.appended - seen


def test_readers_do_not_disturb_each_other() -> None:
    ring = RecordRing(4)
    slow, quick = ring.reader(), ring.reader()
    fill(ring, 3)
    assert len(quick.take(10)[1]) == 3
    fill(ring, 3)
    assert [entry.sequence for entry in quick.take(10)[1]] == [4, 5, 6]
    lost, records = slow.take(10)
    assert (lost, [entry.sequence for entry in records]) == (2, [3, 4, 5, 6])


def test_a_new_reader_starts_at_the_next_record_or_at_the_oldest_one_kept() -> None:
    ring = RecordRing(4)
    fill(ring, 6)
    assert ring.reader().take(10) == (0, [])
    lost, records = ring.reader(from_oldest=True).take(10)
    assert (lost, [entry.sequence for entry in records]) == (0, [3, 4, 5, 6])


def test_a_reader_that_waits_is_woken_once() -> None:
    ring = RecordRing()
    reader = ring.reader()
    woken: list[int] = []
    reader.wake_once(lambda: woken.append(ring.appended))
    assert woken == []
    fill(ring, 3)
    assert woken == [1]


def test_a_reader_with_something_unread_is_woken_at_once() -> None:
    ring = RecordRing()
    reader = ring.reader()
    fill(ring, 1)
    woken: list[bool] = []
    reader.wake_once(lambda: woken.append(True))
    assert woken == [True]


def test_a_forgotten_wake_up_never_comes() -> None:
    ring = RecordRing()
    reader = ring.reader()
    woken: list[bool] = []

    def wake() -> None:
        woken.append(True)

    reader.wake_once(wake)
    reader.forget(wake)
    reader.forget(wake)
    fill(ring, 1)
    assert woken == []


def test_a_wake_up_may_wait_again() -> None:
    ring = RecordRing()
    reader = ring.reader()
    woken: list[int] = []

    def wake() -> None:
        woken.append(ring.appended)
        reader.take(10)
        reader.wake_once(wake)

    reader.wake_once(wake)
    fill(ring, 3)
    assert woken == [1, 2, 3]


def test_nothing_is_no_capacity_and_no_limit() -> None:
    with pytest.raises(ValueError, match="at least one record"):
        RecordRing(0)
    with pytest.raises(ValueError, match="at least one record"):
        RecordRing().reader().take(0)
