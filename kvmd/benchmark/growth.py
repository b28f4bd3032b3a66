"""What a conversion costs by vCPUs, by pages that were converted before, and by the size of memory.

Slots and intervals are looked up for each conversion, so its cost must not grow with their number. kvmd is set beside
itself with little or few; the C floor beside itself shows what of it is KVM's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from kvmd.benchmark.measure import CannotMeasure, Options, Ratio, Report, Series, take_turns
from kvmd.benchmark.runs import Load, run_floor, run_kvmd
from kvmd.units import GIB, MIB, format_size

TARGET = 1.2
"""What a conversion may cost in much memory, or among many pages, beside little or few."""

_VCPUS = (1, 2, 4, 16)
_PAGES = (1, 16, 256, 4096)
_CONVERSIONS = 512
"""In a run, at least, after its first round."""

_MOST = 20_000
"""In a run, but with ``large``: more take minutes."""

_TURNS = {"grid": 7, "memory": 20, "pages": 7}


def measure(options: Options) -> Report:
    """Measure the growth with memory and with pages, and then each cell of vCPUs and pages."""
    report = Report("growth", "cost by vCPUs, pages and memory")
    _compare(report, "memory", [Load(rounds=9), Load(rounds=9, memory=4 * GIB)], options)
    for vcpus in (1, 4):
        fewer = 4096 // vcpus
        _compare(report, "pages", [Load(vcpus=vcpus, rounds=9), Load(vcpus=vcpus, rounds=2, pages=fewer)], options)
    for vcpus in _VCPUS:
        for pages in _PAGES:
            _measure_cell(report, load_of(vcpus, pages), options)
    report.notes += [
        (
            "pages are those of each vCPU; `growth` rows set kvmd, and the floor, beside themselves; a run has at "
            f"least {_CONVERSIONS} conversions after its first round, which is left out"
        ),
        "the C floor never merges memslots, so it ends where they are used up: 32764 here, two for each page",
    ]
    return report


def load_of(vcpus: int, pages: int) -> Load:
    """Return the load of a cell: as many rounds as it needs for its conversions."""
    return Load(vcpus=vcpus, pages=pages, rounds=1 + max(1, _CONVERSIONS // (2 * vcpus * pages)))


def _compare(report: Report, what: str, loads: list[Load], options: Options) -> None:
    small, large = loads
    columns = take_turns(
        {
            "kvmd small": partial(_kvmd, small),
            "kvmd large": partial(_kvmd, large),
            **_of_floor({"floor small": small, "floor large": large}, report),
        },
        rounds=options.rounds(_TURNS[what]),
        unit="us",
    )
    for who, target in (("kvmd", TARGET), ("floor", None)):
        if f"{who} small" in columns and f"{who} large" in columns:
            subject = _named(columns[f"{who} large"], f"growth, {who}, {_words(what, large)}")
            report.ratios.append(Ratio(subject, _named(columns[f"{who} small"], _words(what, small)), target))


def _words(what: str, load: Load) -> str:
    if what == "memory":
        return format_size(load.memory or 64 * MIB)
    return f"{load.pages} pages, {load.vcpus} vCPU{'s' if load.vcpus > 1 else ''}"


def _measure_cell(report: Report, load: Load, options: Options) -> None:
    label = _words("pages", load)
    if load.conversions > _MOST and not options.large:
        report.missing.append(f"{label}: {load.conversions} conversions a run take minutes: --large has it")
        return
    things: dict[str, Callable[[], float]] = {f"kvmd, {label}": partial(_kvmd, load)}
    things |= _of_floor({"floor, service": load}, report)
    try:
        series = take_turns(things, rounds=options.rounds(_TURNS["grid"]), unit="us", warm_up=load.conversions < _MOST)
    except CannotMeasure as error:
        report.missing.append(f"{label}: {error}")
        return
    report.compare(series, "floor, service")


def _of_floor(loads: dict[str, Load], report: Report) -> dict[str, Callable[[], float]]:
    """Return what of the C program can be measured."""
    able: dict[str, Callable[[], float]] = {}
    for label, load in loads.items():
        try:
            run_floor(replace(load, rounds=2), "service")
        except CannotMeasure as error:
            report.missing.append(f"{label}, {_words('pages', load)}: {error}")
        else:
            able[label] = partial(_floor, load)
    return able


def _kvmd(load: Load) -> float:
    return run_kvmd(load).us_per_conversion


def _floor(load: Load) -> float:
    return run_floor(load, "service").us_per_conversion


def _named(series: Series, label: str) -> Series:
    return replace(series, label=label)
