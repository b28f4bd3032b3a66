"""Turn-taking, ratios and their spread."""

import json

import pytest

from kvmd.benchmark.conditions import Conditions, in_words
from kvmd.benchmark.fairness import jain, least_of_most
from kvmd.benchmark.measure import (
    CannotMeasure,
    Fact,
    Options,
    Ratio,
    Report,
    Series,
    middle,
    take_turns,
    take_turns_together,
)
from kvmd.benchmark.tables import as_json, render


def test_things_take_turns_and_the_warm_up_does_not_count() -> None:
    order: list[str] = []

    def thing(name: str) -> float:
        order.append(name)
        return float(len(order))

    series = take_turns({"a": lambda: thing("a"), "b": lambda: thing("b")}, rounds=2, unit="us")
    assert order == ["a", "b", "a", "b", "a", "b"]
    assert series["a"].values == (3.0, 5.0)
    assert series["b"].values == (4.0, 6.0)


def test_several_values_of_one_turn_stay_together() -> None:
    columns = take_turns_together({"a": lambda: (1.0, 10.0)}, rounds=2, units=("us", "ms"), warm_up=False)
    assert [(series.unit, series.values) for series in columns["a"]] == [("us", (1.0, 1.0)), ("ms", (10.0, 10.0))]


def test_a_ratio_is_the_median_of_the_ratios_of_neighbours() -> None:
    # The host became ten times slower in the middle: the ratio of the medians would be 2.
    ratio = Ratio(Series("kvmd", "us", (3.0, 30.0, 30.0)), Series("floor", "us", (2.0, 20.0, 15.0)))
    assert ratio.ratios == (1.5, 1.5, 2.0)
    assert ratio.median == 1.5
    assert ratio.middle == (1.5, 1.75)


def test_series_of_different_length_are_no_ratio() -> None:
    with pytest.raises(ValueError, match="zip"):
        _ = Ratio(Series("a", "us", (1.0,)), Series("b", "us", (1.0, 2.0))).ratios


def test_a_round_in_which_the_other_did_nothing_says_nothing() -> None:
    assert Ratio(Series("a", "/s", (3.0, 4.0)), Series("b", "/s", (0.0, 2.0))).ratios == (2.0,)
    with pytest.raises(CannotMeasure, match="b did nothing in 1 rounds"):
        _ = Ratio(Series("a", "/s", (3.0,)), Series("b", "/s", (0.0,))).ratios


def test_one_value_lies_in_its_own_middle() -> None:
    assert middle([4.0]) == (4.0, 4.0)


def test_quick_means_few_rounds_but_three() -> None:
    assert Options().rounds(40) == 40
    assert Options(quick=True).rounds(40) == 8
    assert Options(quick=True).rounds(5) == 3


def test_what_has_nothing_beside_it_is_a_fact() -> None:
    report = Report("x", "title")
    series = Series("kvmd", "us", (1.0, 2.0))
    report.compare({"kvmd": series}, "floor", 1.5)
    assert report.ratios == []
    assert report.facts == [Fact(series)]
    report.compare({"kvmd": series, "floor": Series("floor", "us", (1.0, 1.0))}, "floor", 1.5)
    assert [(ratio.subject.label, ratio.median, ratio.target) for ratio in report.ratios] == [("kvmd", 1.5, 1.5)]


def a_report() -> Report:
    report = Report("x", "title", figures={"conversions": 512}, missing=["gcc"], notes=["a note"])
    report.ratios.append(Ratio(Series("kvmd", "us", (3.0, 5.0)), Series("floor", "us", (2.0, 2.0)), 1.5))
    report.facts.append(Fact(Series("PSS", "MiB", (10.0,)), 20.0))
    report.conditions = Conditions().as_json()
    return report


def test_a_report_s_json_has_each_value_and_its_own_figures_on_top() -> None:
    document = json.loads(json.dumps(as_json(a_report())))
    assert document["conversions"] == 512
    assert document["missing"] == ["gcc"]
    (row,) = document["ratios"]
    assert row["ratio"] == {"median": 2.0, "quartiles": [1.75, 2.25], "min": 1.5, "max": 2.5, "rounds": 2}
    assert row["subject"]["values"] == [3.0, 5.0]
    assert document["facts"][0]["median"] == 10.0


def test_a_table_says_whether_a_target_is_met() -> None:
    lines = render(a_report()).splitlines()
    assert lines[0] == "## x: title"
    (row,) = [line for line in lines if line.startswith("| kvmd")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["kvmd", "4 us", "floor", "2 us", "**2.00**", "1.75 to 2.25", "1.50", "2.50", "2", "≤ 1.5: missed"]
    (row,) = [line for line in lines if line.startswith("| PSS")]
    assert row.rstrip("| ").endswith("≤ 20 MiB: met")
    assert "- not measured: gcc" in lines


def test_conditions_name_the_load_the_stolen_time_and_the_python() -> None:
    conditions = Conditions().as_json()
    assert isinstance(conditions["load_before"], float)
    assert isinstance(conditions["seconds"], float)
    assert isinstance(conditions["python_optimised"], bool)
    words = in_words({**conditions, "stolen_percent": 12.5, "python_optimised": False})
    assert "12.5 % of CPU time stolen" in words
    assert "not built with profile-guided optimisation" in words


@pytest.mark.parametrize(
    ("shares", "index", "least"),
    [([5.0, 5.0, 5.0], 1.0, 1.0), ([9.0, 0.0, 0.0], 1 / 3, 0.0), ([1.0, 3.0], 0.8, 1 / 3), ([0.0, 0.0], 1.0, 1.0)],
)
def test_fairness(shares: list[float], index: float, least: float) -> None:
    assert jain(shares) == pytest.approx(index)
    assert least_of_most(shares) == pytest.approx(least)
