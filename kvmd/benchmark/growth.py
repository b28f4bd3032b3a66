"""What a conversion costs by vCPUs, by pages that were converted before, and by the size of memory.

Slots and intervals are looked up for each conversion, so its cost must not grow with their number. kvmd is set beside
itself with little or few; the C floor beside itself shows what of it is KVM's. That one is on the boot CPU from the
start, since where the scheduler puts it makes more of a difference than any number of pages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from kvmd.benchmark.measure import CannotMeasure, Fact, Options, Ratio, Report, Series, take_turns
from kvmd.benchmark.runs import Load, floor_cannot, run_floor, run_kvmd, settled
from kvmd.benchmark.sources import build_floor
from kvmd.units import GIB, format_size

TARGET = 1.2
"""What a conversion may cost in much memory, or among many pages, beside little or few."""

_VCPUS = (1, 2, 4, 16)
_PAGES = (1, 16, 256)
"""Of each vCPU; and as many as make ``_MANY`` together."""

_MANY = 4096
_MANY_QUICK = 512
_CONVERSIONS = 4096
_CONVERSIONS_QUICK = 512
"""In a run, at least, after its first round. kvmd tries two CPUs when a guest begins to convert. What it takes to find
the better one is to be no part of the cost among few pages, since among many it is over before the first round is."""

_TURNS = 9
_MEMORY_TURNS = 20
_MODE = "placed"


def measure(options: Options) -> Report:
    """Measure the growth with memory, and then each cell of vCPUs and pages."""
    report = Report("growth", "cost by vCPUs, pages and memory")
    small = settled(Load(rounds=33))
    large = replace(small, memory=4 * GIB)
    has_floor = _has_floor(small, report)
    things: dict[str, Callable[[], float]] = {"kvmd small": partial(_kvmd, small), "kvmd large": partial(_kvmd, large)}
    if has_floor:
        things |= _of_floor({"floor small": small, "floor large": large}, report)
    columns = take_turns(things, rounds=options.rounds(_MEMORY_TURNS), unit="us")
    for who, target in (("kvmd", TARGET), ("floor", None)):
        if f"{who} small" in columns and f"{who} large" in columns:
            subject = _named(columns[f"{who} large"], f"{who}, 1 vCPU, {format_size(large.memory_bytes)}")
            report.ratios.append(
                Ratio(subject, _named(columns[f"{who} small"], format_size(small.memory_bytes)), target)
            )
    for vcpus in _VCPUS:
        _measure_pages(report, small, vcpus, options, has_floor=has_floor)
    report.notes += [
        "pages are those of each vCPU, and all have been converted before; the first walk over them is left out",
        "kvmd, and the floor, stand beside themselves with 16 pages or 64 MiB: what grows is slots and intervals",
        (
            f"the C floor, `{_MODE}` as in `kvmd bench conversions`, never merges memslots, so it ends where they are "
            "used up: 32764 here, two for each page"
        ),
        f"protection {small.protection}, tripwire {small.tripwire}",
    ]
    if not options.large:
        report.notes.append(f"--large measures {_MANY} pages of each of several vCPUs, too, which takes minutes")
    return report


def pages_of(vcpus: int, options: Options) -> list[int]:
    """Return the numbers of pages that are measured with so many vCPUs, ascending."""
    many = _MANY_QUICK if options.quick else _MANY
    pages = {pages for pages in _PAGES if pages * vcpus <= many} | {many // vcpus}
    return sorted(pages | ({_MANY} if options.large else set()))


def load_of(vcpus: int, pages: int, like: Load, options: Options) -> Load:
    """Return the load of a cell: as many rounds as it needs for its conversions, the rest as ``like`` has it."""
    conversions = _CONVERSIONS_QUICK if options.quick else _CONVERSIONS
    return replace(like, vcpus=vcpus, pages=pages, rounds=1 + max(1, conversions // (2 * vcpus * pages)))


def _has_floor(load: Load, report: Report) -> bool:
    """Tell whether anything of the C program can be measured; if not, note why, once for all loads."""
    try:
        build_floor()
        why = floor_cannot(load)
    except CannotMeasure as error:
        why = str(error)
    if why:
        report.missing.append(why)
    return not why


def _measure_pages(report: Report, like: Load, vcpus: int, options: Options, *, has_floor: bool) -> None:
    """Measure a row of cells: all of them take turns."""
    loads = {pages: load_of(vcpus, pages, like, options) for pages in pages_of(vcpus, options)}
    few, many = loads[16], loads[max(loads)]
    # Who stands beside itself is measured one right after the other.
    order = [load for load in loads.values() if load not in (few, many)] + [few, many]
    things: dict[str, Callable[[], float]] = {f"kvmd, {_words(load)}": partial(_kvmd, load) for load in order}
    if has_floor:
        things |= _of_floor({f"floor, {_words(load)}": load for load in order}, report)
    series = take_turns(things, rounds=options.rounds(_TURNS), unit="us")
    for load in loads.values():
        subject, beside = series[f"kvmd, {_words(load)}"], series.get(f"floor, {_words(load)}")
        if beside is None:
            report.facts.append(Fact(subject))
        else:
            report.ratios.append(Ratio(subject, _named(beside, f"floor, {_MODE}")))
    for who, target in (("kvmd", TARGET), ("floor", None)):
        if f"{who}, {_words(many)}" in series and f"{who}, {_words(few)}" in series:
            beside = _named(series[f"{who}, {_words(few)}"], "16 pages")
            report.ratios.append(Ratio(series[f"{who}, {_words(many)}"], beside, target))


def _words(load: Load) -> str:
    return f"{load.vcpus} vCPU{'s' if load.vcpus > 1 else ''}, {load.pages} page{'s' if load.pages > 1 else ''}"


def _of_floor(loads: dict[str, Load], report: Report) -> dict[str, Callable[[], float]]:
    """Return what of the C program can be measured."""
    able: dict[str, Callable[[], float]] = {}
    for label, load in loads.items():
        try:
            run_floor(replace(load, rounds=2), _MODE)
        except CannotMeasure as error:
            report.missing.append(f"{label}: {error}")
        else:
            able[label] = partial(_floor, load)
    return able


def _kvmd(load: Load) -> float:
    return run_kvmd(load).us_per_conversion


def _floor(load: Load) -> float:
    return run_floor(load, _MODE).us_per_conversion


def _named(series: Series, label: str) -> Series:
    return replace(series, label=label)
