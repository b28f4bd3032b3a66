"""What a run cost, out of records and out of the C floor's line."""

import json

import pytest

from kvmd.benchmark.measure import CannotMeasure
from kvmd.benchmark.runs import Load, floor_cannot, parse_floor
from kvmd.benchmark.tally import Tally
from kvmd.conversion.messages import Cause, Outcome
from kvmd.conversion.record import ConversionRecord
from kvmd.ranges import PageState
from kvmd.units import GIB, MIB, PAGE_SIZE


def record(answered_us: int, outcome: Outcome = Outcome.CONVERTED) -> ConversionRecord:
    return ConversionRecord(
        sequence=1,
        wall_ns=0,
        monotonic_ns=answered_us * 1000,
        vcpu=0,
        cause=Cause.IMPLICIT,
        gpa=0,
        size_bytes=PAGE_SIZE,
        came_from=PageState.PRIVATE,
        to=PageState.SHARED,
        outcome=outcome,
        merged=1,
        waiting_ns=20000,
        applying_ns=30000,
        discarding_ns=4000,
    )


def test_the_first_round_is_told_apart_and_begins_with_the_first_fault() -> None:
    tally = Tally(first_round=2)
    tally.add([record(1050), record(1200)])
    tally.add([record(1300), record(1400), record(1650)])
    run = tally.run(expected=5)
    assert run.first_round == 2
    assert run.us_first_round == 100.0  # from 1000, when the vCPU left the guest, to 1200
    assert run.conversions == 3
    assert run.us_per_conversion == 150.0
    assert run.us_in_kvm == 34.0
    assert run.us_first == 30.0


def test_only_conversions_count() -> None:
    tally = Tally(first_round=1)
    tally.add([record(100), record(150, Outcome.SPURIOUS), record(160, Outcome.STALE), record(200), record(300)])
    run = tally.run(expected=3)
    assert (run.conversions, run.us_per_conversion) == (2, 100.0)


@pytest.mark.parametrize("expected", [2, 4])
def test_a_guest_that_made_other_conversions_was_not_measured(expected: int) -> None:
    tally = Tally(first_round=1)
    tally.add([record(100), record(200), record(300)])
    with pytest.raises(CannotMeasure, match=f"made 3 conversions instead of {expected}"):
        tally.run(expected)


def test_a_load_has_two_conversions_for_each_page_and_round() -> None:
    load = Load(vcpus=4, pages=16, rounds=5)
    assert (load.first_round, load.steady, load.conversions) == (128, 512, 640)


@pytest.mark.parametrize(
    ("load", "memory"),
    [
        (Load(), 64 * MIB),
        (Load(vcpus=2, pages=4096), 64 * MIB),
        (Load(vcpus=16, pages=4096), 512 * MIB),
        (Load(memory=4 * GIB), 4 * GIB),
    ],
)
def test_memory_is_what_was_asked_for_or_has_room_for_the_pages(load: Load, memory: int) -> None:
    assert load.memory_bytes == memory


FLOOR = {
    "status": 0,
    "stopped": None,
    "conversions": 544,
    "us_first_round": 90.5,
    "us_per_conversion": 250.5,
    "us_in_kvm_first": 80.0,
    "us_in_kvm": 150.25,
    "cuts": 16,
    "pauses": 16,
    "discards": 544,
}


def test_the_floor_s_line_becomes_a_run() -> None:
    run = parse_floor(json.dumps(FLOOR), "", Load())
    assert run.conversions == 512
    assert run.us_per_conversion == 250.5
    assert run.us_in_kvm == 150.25
    assert (run.first_round, run.us_first_round) == (32, 90.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"status": 120, "stopped": "out of memslots"}, "the C floor stopped the guest: out of memslots"),
        ({"conversions": 12}, "12 conversions instead of 544"),
        # Not what kvmd does, so not what it may be measured beside.
        ({"discards": 0}, "did not do what kvmd does"),
        ({"pauses": 0}, "did not do what kvmd does"),
    ],
)
def test_a_floor_that_did_something_else_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(CannotMeasure, match=message):
        parse_floor(json.dumps(FLOOR | change), "", Load())


def test_a_floor_that_cannot_begin_says_why_in_its_last_line() -> None:
    with pytest.raises(CannotMeasure, match=r"cannot run here: floor: KVM_CREATE_GUEST_MEMFD: Invalid argument$"):
        parse_floor("", "noise\nfloor: KVM_CREATE_GUEST_MEMFD: Invalid argument\n", Load())


def test_the_floor_has_not_every_protection() -> None:
    assert floor_cannot(Load()) is None
    assert "guest-memfd" in (floor_cannot(Load(protection="guest-memfd")) or "")
    assert "attribute" in (floor_cannot(Load(tripwire="attribute")) or "")
