import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmd.conversion.histogram import LARGEST, RELATIVE_ERROR, SMALLEST, LatencyHistogram

in_range = st.floats(min_value=SMALLEST, max_value=LARGEST, exclude_max=True)


def nearest_rank(values: list[float], fraction: float) -> float:
    return sorted(values)[max(1, math.ceil(fraction * len(values) - 1e-9)) - 1]


@given(in_range)
def test_one_value_comes_back_within_the_error(value: float) -> None:
    histogram = LatencyHistogram()
    histogram.add(value)
    assert abs(histogram.percentile(0.5) - value) <= RELATIVE_ERROR * value
    assert histogram.snapshot().maximum == value


@given(st.lists(in_range, min_size=1, max_size=300), st.sampled_from([0.5, 0.9, 0.99, 1.0, 0.7]))
def test_percentiles_equal_those_of_the_sorted_values_within_the_error(values: list[float], fraction: float) -> None:
    histogram = LatencyHistogram()
    for value in values:
        histogram.add(value)
    exact = nearest_rank(values, fraction)
    assert abs(histogram.percentile(fraction) - exact) <= RELATIVE_ERROR * exact


@given(st.lists(st.floats(allow_nan=False), max_size=50))
def test_any_number_is_counted_and_percentiles_ascend(values: list[float]) -> None:
    histogram = LatencyHistogram()
    for value in values:
        histogram.add(value)
    snapshot = histogram.snapshot()
    assert snapshot.count == len(values)
    assert 0 <= snapshot.p50 <= snapshot.p90 <= snapshot.p99 <= snapshot.maximum


def test_an_empty_histogram_is_all_zero() -> None:
    snapshot = LatencyHistogram().snapshot()
    assert (snapshot.count, snapshot.p50, snapshot.p99, snapshot.maximum) == (0, 0, 0, 0)


def test_values_below_the_smallest_bucket_are_zero() -> None:
    histogram = LatencyHistogram()
    for value in (-3.0, 0.0, SMALLEST / 2):
        histogram.add(value)
    assert histogram.percentile(1.0) == 0.0


def test_values_beyond_the_largest_bucket_are_the_maximum() -> None:
    histogram = LatencyHistogram()
    histogram.add(LARGEST)
    histogram.add(LARGEST * 3)
    assert histogram.percentile(0.5) == LARGEST * 3


def test_the_99th_percentile_of_a_hundred_is_not_the_largest() -> None:
    histogram = LatencyHistogram()
    for _ in range(99):
        histogram.add(100.0)
    histogram.add(1_000_000.0)
    snapshot = histogram.snapshot()
    assert snapshot.p99 == pytest.approx(100.0, rel=RELATIVE_ERROR)
    assert snapshot.maximum == 1_000_000.0


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5])
def test_a_fraction_outside_zero_to_one_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="fractions above 0"):
        LatencyHistogram().percentile(fraction)
