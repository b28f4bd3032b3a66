"""What the growth of a conversion's cost is made of, without a guest."""

import pytest

from kvmd.benchmark import growth
from kvmd.benchmark.measure import CannotMeasure, Options
from kvmd.benchmark.runs import Load
from kvmd.benchmark.tally import Run


def a_run(load: Load) -> Run:
    return Run(512, 100.0 + load.pages, 50.0, 32, 200.0, 100.0)


@pytest.fixture(autouse=True)
def _kvmd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "settled", lambda load: load)
    monkeypatch.setattr(growth, "run_kvmd", a_run)


def test_a_missing_floor_is_told_once_for_all_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler() -> None:
        raise CannotMeasure("install gcc")

    monkeypatch.setattr(growth, "build_floor", no_compiler)
    report = growth.measure(Options())
    assert report.missing == ["install gcc"]
    assert {row.beside.label for row in report.ratios} == {"64 MiB", "16 pages"}
    assert {row.target for row in report.ratios} == {growth.TARGET}


def test_a_load_that_the_floor_has_no_room_for_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_floor(load: Load, _mode: str) -> Run:
        if load.pages == 4096:
            raise CannotMeasure("out of memslots")
        return a_run(load)

    monkeypatch.setattr(growth, "build_floor", lambda: None)
    monkeypatch.setattr(growth, "run_floor", run_floor)
    report = growth.measure(Options(large=True))
    assert report.missing == [
        f"floor, {vcpus} vCPU{'s' if vcpus > 1 else ''}, 4096 pages: out of memslots" for vcpus in (1, 2, 4, 16)
    ]
    facts = [fact.series.label for fact in report.facts]
    assert facts == [f"kvmd, {vcpus} vCPU{'s' if vcpus > 1 else ''}, 4096 pages" for vcpus in (1, 2, 4, 16)]


def test_pages_are_one_to_4096_of_all_vcpus_together() -> None:
    assert growth.pages_of(1, Options()) == [1, 16, 256, 4096]
    assert growth.pages_of(4, Options()) == [1, 16, 256, 1024]
    assert growth.pages_of(16, Options()) == [1, 16, 256]
    assert growth.pages_of(16, Options(large=True)) == [1, 16, 256, 4096]
    assert growth.pages_of(16, Options(quick=True)) == [1, 16, 32]


def test_few_pages_are_converted_as_often_as_it_takes_to_forget_the_start() -> None:
    for pages in (1, 16, 256):
        assert growth.load_of(1, pages, Load(), Options()).steady == 4096
    assert growth.load_of(16, 256, Load(), Options()).steady == 2 * 4096
    assert growth.load_of(4, 16, Load(), Options(quick=True)).steady == 512
