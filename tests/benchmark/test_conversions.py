"""What stands beside kvmd's conversions, without a guest."""

from contextlib import nullcontext
from unittest import mock

import pytest

from kvmd.benchmark import conversions, runs
from kvmd.benchmark.measure import CannotMeasure, Options
from kvmd.benchmark.runs import Load, on_memslots, settled
from kvmd.benchmark.tally import Run
from kvmd.errors import ConfigError, HostError
from kvmd.host_choice import Choice
from kvmd.kvm.system import Kvm
from kvmd.protection.two_views import Tripwire


def a_run(us: float) -> Run:
    return Run(512, us, us / 2, 32, 2 * us, us)


def host_that_chooses(monkeypatch: pytest.MonkeyPatch, choice: Choice) -> mock.Mock:
    vm = mock.Mock()
    monkeypatch.setattr("os.access", lambda *_: True)
    monkeypatch.setattr(Kvm, "open", lambda: nullcontext(mock.Mock()))
    monkeypatch.setattr(runs, "create_vm", lambda *_: (vm, choice))
    return vm


def test_a_load_is_settled_as_kvmd_settles_it_here(monkeypatch: pytest.MonkeyPatch) -> None:
    vm = host_that_chooses(monkeypatch, Choice("emulated", Tripwire.HOLE))
    assert settled(Load(pages=3, protection="auto")) == Load(pages=3, protection="emulated", tripwire="hole")
    vm.close.assert_called_once_with()
    host_that_chooses(monkeypatch, Choice("guest-memfd"))
    assert settled(Load(protection="auto")) == Load(protection="guest-memfd")
    host_that_chooses(monkeypatch, Choice("emulated", Tripwire.ATTRIBUTE))
    assert settled(Load()).tripwire == "attribute"
    assert on_memslots(Load()).tripwire == "guest_memfd"


def test_what_this_host_or_no_host_has_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    host_that_chooses(monkeypatch, Choice("none"))
    with pytest.raises(ConfigError, match="protection"):
        settled(Load(protection="walls"))
    monkeypatch.setattr(runs, "create_vm", mock.Mock(side_effect=HostError("no such VM")))
    with pytest.raises(CannotMeasure, match="no such VM"):
        settled(Load())


def test_nothing_stands_beside_kvmd_that_makes_other_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    host_that_chooses(monkeypatch, Choice("emulated", Tripwire.ATTRIBUTE))
    monkeypatch.setattr(conversions, "run_kvmd", lambda _: a_run(100.0))
    report = conversions.measure_load(Load(), Options(), turns=2)
    assert report.ratios == []
    (what,) = report.missing
    assert "not attribute: choose one with --tripwire" in what
    assert report.figures["tripwire"] == "attribute"
    assert report.figures["us_per_conversion"] == 100.0


def test_each_way_of_the_floor_stands_beside_kvmd_and_one_has_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    host_that_chooses(monkeypatch, Choice("emulated", Tripwire.GUEST_MEMFD))
    monkeypatch.setattr(conversions, "run_kvmd", lambda _: a_run(100.0))
    of = {"service": 80.0, "early": 50.0, "placed": 25.0, "thread": 40.0}
    monkeypatch.setattr(conversions, "run_floor", lambda _, mode: a_run(of[mode]))
    report = conversions.measure_load(Load(), Options(), turns=2)
    assert [(row.beside.label, row.median, row.target) for row in report.ratios][:4] == [
        ("floor, service", 1.25, 1.3),
        ("floor, early", 2.0, None),
        ("floor, placed", 4.0, None),
        ("floor, thread", 2.5, None),
    ]
    assert {"floor_early", "ratio_early", "ratio_thread", "ratio_service", "ratio_in_kvm"} <= report.figures.keys()


def test_turns_alone_leave_both_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    host_that_chooses(monkeypatch, Choice("emulated", Tripwire.GUEST_MEMFD))
    monkeypatch.setattr(conversions, "run_kvmd", lambda _: a_run(100.0))
    monkeypatch.setattr(conversions, "run_floor", lambda *_: a_run(80.0))
    report = conversions.measure(Options(), turns=2)
    assert [row.subject.label for row in report.ratios if row.target is not None] == ["kvmd, 1 vCPU", "kvmd, 4 vCPUs"]
    assert report.figures["runs"] == 2
