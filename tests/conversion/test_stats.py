import msgspec
import pytest

from kvmd.conversion.histogram import RELATIVE_ERROR
from kvmd.conversion.messages import Cause, Outcome
from kvmd.conversion.record import ConversionRecord
from kvmd.conversion.stats import HOTTEST_SHOWN, ConversionStats, RequestCount
from kvmd.ranges import PageState
from kvmd.units import MIB, PAGE_SIZE
from tests.conversion.records import RECORD

SPURIOUS = msgspec.structs.replace(
    RECORD, outcome=Outcome.SPURIOUS, merged=0, waiting_ns=20000, applying_ns=0, discarding_ns=0
)


def stats_of(*records: ConversionRecord) -> ConversionStats:
    stats = ConversionStats()
    for record in records:
        stats.add(record)
    return stats


def test_nothing_yet() -> None:
    snapshot = ConversionStats().snapshot()
    assert snapshot.counts == ()
    assert snapshot.requests() == snapshot.conversions == snapshot.conversions_per_second == 0
    assert snapshot.hottest == ()
    assert snapshot.first_monotonic_ns is None
    assert snapshot.total.count == 0


def test_requests_are_counted_by_cause_direction_and_outcome() -> None:
    explicit = msgspec.structs.replace(RECORD, cause=Cause.EXPLICIT, to=PageState.PRIVATE)
    snapshot = stats_of(RECORD, SPURIOUS, RECORD, explicit).snapshot()
    assert snapshot.counts == (
        RequestCount(Cause.IMPLICIT, PageState.SHARED, Outcome.CONVERTED, 2),
        RequestCount(Cause.IMPLICIT, PageState.SHARED, Outcome.SPURIOUS, 1),
        RequestCount(Cause.EXPLICIT, PageState.PRIVATE, Outcome.CONVERTED, 1),
    )
    assert snapshot.requests() == 4
    assert snapshot.requests(cause=Cause.IMPLICIT) == 3
    assert snapshot.requests(to=PageState.SHARED, outcome=Outcome.CONVERTED) == 2
    assert snapshot.conversions == 3


def test_pages_are_counted_by_direction_and_only_when_converted() -> None:
    large = msgspec.structs.replace(RECORD, size_bytes=2 * MIB, to=PageState.PRIVATE)
    refused = msgspec.structs.replace(large, outcome=Outcome.REFUSED, merged=0)
    snapshot = stats_of(RECORD, SPURIOUS, large, refused).snapshot()
    assert (snapshot.pages_to_shared, snapshot.pages_to_private) == (1, 512)


def test_a_few_bytes_that_arrived_as_mmio_are_one_conversion_of_their_page() -> None:
    access = msgspec.structs.replace(RECORD, gpa=0x5C10, size_bytes=8)
    snapshot = stats_of(RECORD, access).snapshot()
    assert snapshot.pages_to_shared == 2
    assert [(hot.gpa, hot.size_bytes, hot.count) for hot in snapshot.hottest] == [(0x5000, PAGE_SIZE, 2)]


def test_a_request_without_a_change_counts_for_waiting_and_total_only() -> None:
    snapshot = stats_of(RECORD, SPURIOUS).snapshot()
    assert (snapshot.waiting.count, snapshot.total.count) == (2, 2)
    assert (snapshot.applying.count, snapshot.discarding.count) == (1, 1)
    assert snapshot.applying.p50 == pytest.approx(100.0, rel=RELATIVE_ERROR)
    assert snapshot.total.maximum == 111.0
    assert snapshot.total.p50 == pytest.approx(20.0, rel=RELATIVE_ERROR)


def test_the_hottest_are_the_ones_converted_most() -> None:
    other = msgspec.structs.replace(RECORD, gpa=0x9000)
    snapshot = stats_of(RECORD, other, SPURIOUS, SPURIOUS, other).snapshot()
    assert [(hot.gpa, hot.count) for hot in snapshot.hottest] == [(0x9000, 2), (0x5000, 1)]


def test_the_list_of_the_hottest_is_bounded() -> None:
    many = [msgspec.structs.replace(RECORD, gpa=page * PAGE_SIZE) for page in range(3 * HOTTEST_SHOWN)]
    assert len(stats_of(*many).snapshot().hottest) == HOTTEST_SHOWN


def test_the_rate_is_over_the_time_from_first_to_last() -> None:
    last = msgspec.structs.replace(RECORD, monotonic_ns=3_000_000_000)
    snapshot = stats_of(RECORD, SPURIOUS, RECORD, last).snapshot()
    assert (snapshot.first_monotonic_ns, snapshot.last_monotonic_ns) == (1_000_000_000, 3_000_000_000)
    assert snapshot.conversions_per_second == 1.5


def test_a_snapshot_does_not_change_later() -> None:
    stats = stats_of(RECORD)
    before = stats.snapshot()
    stats.add(RECORD)
    assert before.conversions == 1
    assert stats.snapshot().conversions == 2
