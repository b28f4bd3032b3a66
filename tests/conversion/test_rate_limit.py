"""The rate of conversions, by a clock of the test's own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmd.conversion.rate_limit import BURST_NS, RateLimit

SECOND_NS = 1_000_000_000
START_NS = 5 * SECOND_NS


def test_nobody_waits_at_first() -> None:
    assert RateLimit(10).due_ns == 0


def test_a_burst_goes_on_at_once_and_what_comes_then_at_the_rate() -> None:
    rate = RateLimit(100)  # one every 10 ms, ten at once
    for _ in range(10):
        rate.count(START_NS)
        assert rate.due_ns <= START_NS
    waits = []
    now_ns = START_NS
    for _ in range(5):
        rate.count(now_ns)
        waits.append(rate.due_ns - now_ns)
        now_ns = max(now_ns, rate.due_ns)
    assert waits == [10_000_000] * 5


def test_time_without_a_conversion_is_saved_up_to_a_burst_and_no_more() -> None:
    rate = RateLimit(100)
    rate.count(START_NS)
    later_ns = START_NS + 1000 * SECOND_NS
    for _ in range(10):
        rate.count(later_ns)
        assert rate.due_ns <= later_ns
    rate.count(later_ns)
    assert rate.due_ns == later_ns + 10_000_000


def test_a_slow_rate_has_no_burst() -> None:
    rate = RateLimit(1)
    rate.count(START_NS)
    assert rate.due_ns == START_NS + SECOND_NS - BURST_NS


@pytest.mark.parametrize("vcpus", [1, 3])
@given(per_second=st.integers(1, 1_000_000), pauses_ns=st.lists(st.integers(0, SECOND_NS), min_size=1, max_size=40))
def test_whoever_waits_until_due_never_gets_ahead_of_the_rate(
    vcpus: int, per_second: int, pauses_ns: list[int]
) -> None:
    rate = RateLimit(per_second)
    now_ns, made = START_NS, 0
    for pause_ns in pauses_ns:
        now_ns = max(now_ns + pause_ns, rate.due_ns)
        for _ in range(vcpus):  # each asks once, and then waits
            rate.count(now_ns)
        made += vcpus
        # Of the last round nobody has waited yet.
        allowed = (now_ns - START_NS + BURST_NS) // (SECOND_NS // per_second) + 1 + vcpus
        assert made <= allowed
