"""Conversions end to end: kvmd beside a C program that makes the same KVM calls.

The guest walks its pages, touching the shared and then the private view of each. What counts is the wall time of a
conversion, from the end of the first round (which cuts memory into pages) to the end of the last.
"""

from __future__ import annotations

from dataclasses import replace

from bench.measure import Options, Ratio, Report, Series, take_turns_together
from bench.runs import Load, run_floor, run_kvmd

TARGET = 1.5
"""What kvmd may take at most, in floors with a service thread."""

_LOADS = (Load(vcpus=1, rounds=17), Load(vcpus=4, rounds=5))
_UNITS = ("us", "us")


def measure(options: Options) -> Report:
    """Measure with 1 and 4 vCPUs."""
    report = Report("pingpong", "one conversion, end to end")
    for load in _LOADS:
        _measure_load(report, load, options)
    report.notes += [
        (
            "`floor` is bench/floor.c: it converts in a `service` thread that the faulting one wakes and waits for, as "
            "kvmd by its design, or in the faulting `thread`"
        ),
        (
            "`in KVM`: the part that goes into changing slots and discarding; in kvmd's is also its Python between "
            "these calls, and its waiting for the interpreter lock after each"
        ),
        f"16 pages for each vCPU, 64 MiB of memory, {_LOADS[0].steady} conversions a round, the first walk not counted",
    ]
    return report


def _measure_load(report: Report, load: Load, options: Options) -> None:
    vcpus = f"{load.vcpus} vCPU{'s' if load.vcpus > 1 else ''}"
    kvmd, service, thread = f"kvmd, {vcpus}", "floor, service", "floor, thread"

    def of_kvmd() -> tuple[float, float]:
        run = run_kvmd(load)
        return run.us_per_conversion, run.us_in_kvm

    def of_floor(mode: str) -> tuple[float, float]:
        run = run_floor(load, mode)
        return run.us_per_conversion, run.us_in_kvm

    columns = take_turns_together(
        {kvmd: of_kvmd, service: lambda: of_floor("service"), thread: lambda: of_floor("thread")},
        rounds=options.rounds(40),
        units=_UNITS,
    )
    report.ratios += [
        Ratio(columns[kvmd][0], columns[service][0], TARGET),
        Ratio(columns[kvmd][0], columns[thread][0]),
        Ratio(columns[service][0], columns[thread][0]),
        Ratio(_in_kvm(columns[kvmd][1]), _in_kvm(columns[service][1])),
    ]


def _in_kvm(series: Series) -> Series:
    """Return the series with a label that says what part of the time it is."""
    return replace(series, label=f"{series.label}, in KVM")
