from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmd.conversion.messages import Cause, Outcome
from kvmd.conversion.record import ConversionRecord
from kvmd.fleet.machine_events import in_order
from kvmd.fleet.places import Place, Places, parse_place, parse_places
from kvmd.machine_process.lifecycle import LifecycleEvent
from kvmd.machine_process.messages import EventBatch
from kvmd.ranges import PageState

NUMBERS = st.integers(0, 10**18 - 1)


@given(NUMBERS, NUMBERS)
def test_a_place_is_read_as_it_was_written(step: int, conversion: int) -> None:
    assert parse_place(str(Place(step, conversion))) == (step, conversion)


@given(st.dictionaries(st.integers(1, 2**63), st.builds(Place, NUMBERS, NUMBERS), max_size=5))
def test_places_of_all_machines_are_read_as_they_were_written(places: dict[int, Place]) -> None:
    written = Places()
    written.set(0, Place(1, 1))
    for created_ns, place in places.items():
        written.set(created_ns, Place(0, 0))
        written.set(created_ns, place)
    for _ in range(2):
        written.forget(0)
        assert parse_places(str(written)) == places


@given(st.text())
def test_any_other_text_is_refused_in_words(text: str) -> None:
    for parse in (parse_place, parse_places):
        try:
            parse(text)
        except ValueError as error:
            assert "never an id" in str(error)  # noqa: PT017 - either it is one, or it is refused like this


@pytest.mark.parametrize("text", ["all~", "all~1", "all~x.1-2", "all~1.1-2~", "some~1.1-2", "all~1.1-2.3"])
def test_almost_places_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="never an id"):
        parse_places(text)


def step(number: int, wall_ns: int) -> LifecycleEvent:
    return LifecycleEvent(number=number, wall_ns=wall_ns, change="paused", state="paused")


def record(sequence: int, wall_ns: int) -> ConversionRecord:
    return ConversionRecord(
        sequence, wall_ns, wall_ns, 0, Cause.IMPLICIT, 0, 4096, None, PageState.SHARED, Outcome.CONVERTED, 1, 1, 1, 1
    )


def test_two_series_become_one_by_time_and_keep_their_own_order() -> None:
    # The second step's clock went back: its place in its series counts.
    batch = EventBatch(0, 0, [step(1, 15), step(2, 5)], [record(1, 10), record(2, 20)], 2, 2)
    found = [item.number if isinstance(item, LifecycleEvent) else -item.sequence for item in in_order(batch)]
    assert found == [-1, 1, 2, -2]
