"""The page of the last run's tables."""

import json
from pathlib import Path

import pytest

from kvmd.benchmark.catalogue import SUMMARIES
from kvmd.benchmark.measure import Fact, Report, Series
from kvmd.benchmark.page import PageError, fill, main, tables_of
from kvmd.benchmark.tables import as_json

PAGE = """# Title

<!-- tables of start -->
old
<!-- end -->

Words between.

<!-- tables of targets -->
<!-- end -->

<!-- tables of large in the lab -->
<!-- end -->
"""


def a_report(name: str) -> Report:
    return Report(name, "title", facts=[Fact(Series("figure", "ms", (1.0, 3.0)), 5.0)])


def test_a_page_is_filled_in_its_places_and_nowhere_else(tmp_path: Path) -> None:
    page, here, lab = tmp_path / "page.md", tmp_path / "here.json", tmp_path / "lab.json"
    page.write_text(PAGE)
    here.write_text(json.dumps({"benchmarks": [as_json(a_report("start"))], "not_measured": {}}))
    lab.write_text(json.dumps(as_json(a_report("large"))))
    assert main([str(here), f"lab={lab}", str(page)]) == 0
    text = page.read_text()
    assert "old" not in text
    assert text.count("\n| figure") == 2
    assert text.count("\n| start     | figure") == 1
    assert text.startswith("# Title\n")
    assert "\nWords between.\n" in text
    assert main([str(here), f"lab={lab}", str(page)]) == 0
    assert page.read_text() == text


def test_a_table_without_a_place_is_refused() -> None:
    with pytest.raises(PageError, match="the page has no place for api: add <!-- tables of NAME -->"):
        fill(PAGE, {"api": "table"})


def test_something_else_than_results_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(PageError, match="no results of `kvmd bench --json`"):
        tables_of({"benchmarks": [{"no": "name"}]})
    page, broken = tmp_path / "page.md", tmp_path / "broken.json"
    page.write_text(PAGE)
    broken.write_text("{")
    assert main([str(broken), str(page)]) == 1
    assert page.read_text() == PAGE
    assert capsys.readouterr().err.startswith("kvmd.benchmark.page: ")


def test_the_real_page_has_a_place_for_every_benchmark() -> None:
    page = (Path(__file__).parents[2] / "docs" / "performance.md").read_text(encoding="utf-8")
    fill(page, dict.fromkeys([*SUMMARIES, "profile", "targets", "large in the lab"], ""))
