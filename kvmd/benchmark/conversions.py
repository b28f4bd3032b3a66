"""Conversions end to end: kvmd beside a C program that makes the same KVM calls.

The guest walks its pages, touching the shared and then the private view of each. What counts is the wall time of a
conversion, from the end of the first round (which cuts memory into pages) to the end of the last.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median

from kvmd.benchmark.measure import CannotMeasure, Fact, Options, Ratio, Report, Series
from kvmd.benchmark.runs import Load, run_floor, run_kvmd, settled
from kvmd.benchmark.tables import spread
from kvmd.benchmark.tally import Run
from kvmd.units import format_size

TARGETS = {1: 1.3, 4: 1.5}
"""What kvmd may take at most, in floors with a service thread, by vCPUs."""

USUAL = Load(vcpus=1, pages=16, rounds=17)
_OTHER = Load(vcpus=4, pages=16, rounds=5)
_TURNS = 40
_MODES = ("service", "early", "placed", "thread")


def measure(options: Options, turns: int | None = None) -> Report:
    """Measure with 1 and 4 vCPUs, as ``measure_load`` does; the single figures are those of 1."""
    report = measure_load(USUAL, options, turns)
    other = measure_load(_OTHER, options, turns)
    report.ratios += other.ratios
    report.facts += other.facts
    report.missing += [what for what in other.missing if what not in report.missing]
    return report


def measure_load(load: Load, options: Options, turns: int | None = None) -> Report:
    """Measure one load, of kvmd and of the C program in all its modes, in turns.

    Args:
        load: what the guest does.
        options: as everywhere.
        turns: runs of each; by default as many as ``options`` say.

    Raises:
        CannotMeasure: kvmd cannot run it here.
        ConfigError: there is no such machine.
    """
    load = settled(load)
    report = Report("conversions", "one conversion, end to end")
    things: dict[str, Callable[[], Run]] = {"kvmd": partial(run_kvmd, load)}
    things |= {f"floor_{mode}": partial(run_floor, load, mode) for mode in _MODES}
    runs = _in_turns(things, turns or options.rounds(_TURNS), report)
    _add_figures(report, load, runs)
    _add_rows(report, load, runs)
    report.notes += [
        (
            "`floor` is bench/floor.c, the same guest and the same KVM calls in C: it converts in a `service` thread "
            "that the faulting one wakes and waits for, as kvmd by its design, or in the faulting `thread`; `early`: a "
            "service that answers in kvmd's order, before it discards and makes the next tripwire's guest_memfd; "
            "`placed`: the same from the boot CPU, where one vCPU alone is, too; kvmd goes there where that is faster"
        ),
        (
            "`in KVM`: the part that goes into changing slots and discarding; in kvmd's is also its Python between "
            "these calls, and its waiting for the interpreter lock after each"
        ),
        (
            f"{load.pages} pages for each vCPU, {format_size(load.memory_bytes)} of memory, protection "
            f"{load.protection}, tripwire {load.tripwire}; {load.steady} conversions a run: as many as the first walk "
            "over the pages has, which cuts memory, are left out"
        ),
    ]
    return report


def _in_turns(things: dict[str, Callable[[], Run]], turns: int, report: Report) -> dict[str, list[Run]]:
    """Let them take turns after one that does not count. What the C program cannot do is left out, and noted."""
    for name in list(things):
        try:
            things[name]()
        except CannotMeasure as error:
            if name == "kvmd":
                raise
            del things[name]
            if str(error) not in report.missing:
                report.missing.append(str(error))
    runs: dict[str, list[Run]] = {name: [] for name in things}
    for _ in range(turns):
        for name, thing in things.items():
            runs[name].append(thing())
    return runs


def _add_figures(report: Report, load: Load, runs: dict[str, list[Run]]) -> None:
    report.figures |= {
        "vcpus": load.vcpus,
        "pages": load.pages,
        "rounds": load.rounds,
        "memory": load.memory_bytes,
        "protection": load.protection,
        "tripwire": load.tripwire,
        "runs": len(runs["kvmd"]),
        **_single(runs["kvmd"]),
    }
    for name, theirs in runs.items():
        if name != "kvmd":
            report.figures[name] = _single(theirs)
            report.figures[f"ratio_{name.removeprefix('floor_')}"] = spread(_ratios(runs["kvmd"], theirs))
    if "floor_service" in runs:
        in_kvm = [
            one.us_in_kvm / other.us_in_kvm for one, other in zip(runs["kvmd"], runs["floor_service"], strict=True)
        ]
        report.figures["ratio_in_kvm"] = spread(in_kvm)


def _ratios(ours: list[Run], theirs: list[Run]) -> list[float]:
    return [one.us_per_conversion / other.us_per_conversion for one, other in zip(ours, theirs, strict=True)]


def _single(runs: list[Run]) -> dict[str, object]:
    """Return the medians over runs of the same load."""
    us = median(run.us_per_conversion for run in runs)
    return {
        "conversions": runs[0].conversions,
        "us_per_conversion": round(us, 3),
        "us_in_kvm": round(median(run.us_in_kvm for run in runs), 3),
        "per_second": round(1e6 / us, 1),
        "first_round_conversions": runs[0].first_round,
        "first_round_us_per_conversion": round(median(run.us_first_round for run in runs), 3),
    }


def _add_rows(report: Report, load: Load, runs: dict[str, list[Run]]) -> None:
    vcpus = f"{load.vcpus} vCPU{'s' if load.vcpus > 1 else ''}"
    whole = {name: _series(_label(name, vcpus), [run.us_per_conversion for run in each]) for name, each in runs.items()}
    kvmd = whole.pop("kvmd")
    if not whole:
        report.facts.append(Fact(kvmd))
    for name, floor in whole.items():
        report.ratios.append(Ratio(kvmd, floor, TARGETS.get(load.vcpus) if name == "floor_service" else None))
    service, thread = whole.get("floor_service"), whole.get("floor_thread")
    if service is not None and thread is not None:
        report.ratios.append(Ratio(service, thread))
    for what, of in (("in KVM", _in_kvm), ("first round", _first_round)):
        ours = _series(f"{_label('kvmd', vcpus)}, {what}", [of(run) for run in runs["kvmd"]])
        if "floor_service" in runs:
            theirs = _series(f"floor, service, {what}", [of(run) for run in runs["floor_service"]])
            report.ratios.append(Ratio(ours, theirs))
        else:
            report.facts.append(Fact(ours))


def _in_kvm(run: Run) -> float:
    return run.us_in_kvm


def _first_round(run: Run) -> float:
    return run.us_first_round


def _label(name: str, vcpus: str) -> str:
    return f"kvmd, {vcpus}" if name == "kvmd" else f"floor, {name.removeprefix('floor_')}"


def _series(label: str, values: list[float]) -> Series:
    return Series(label, "us", tuple(values))
