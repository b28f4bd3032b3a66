"""Explicit conversions of a large range beside the bare calls in a C loop: emulated, and on KVM's own private memory.

The latter needs a host with KVM_X86_SW_PROTECTED_VM, such as the lab (``lab/run .venv/bin/kvmd bench large``).
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from statistics import median
from unittest import mock

import trio

from kvmd.benchmark.measure import CannotMeasure, Fact, Options, Report, Series, take_turns
from kvmd.benchmark.runs import require_kvm
from kvmd.benchmark.sources import build_bare
from kvmd.conversion.changes import Change, Limits
from kvmd.conversion.messages import Outcome
from kvmd.conversion.record import ConversionRecord
from kvmd.conversion.ring import DEFAULT_CAPACITY
from kvmd.conversion_service import ConversionService
from kvmd.errors import HostError
from kvmd.guests import GUESTS
from kvmd.machine import Machine
from kvmd.spec.machine import MachineSpec
from kvmd.stop import StopReason
from kvmd.units import GIB, MIB, PAGE_SIZE, format_size

TARGET = 1.3
"""What a conversion of 1 GiB may cost at most, in bare loops, where KVM has private memory; one page that is asked for
meanwhile may wait for one chunk."""

_CHUNK = Limits().chunk_bytes
_LARGE = GIB
_BARE_MODES = {"emulated": "slots", "guest-memfd": "attributes"}
"""Protections, each with what the C program calls the same. Emulated by attributes, where KVM has them, kvmd would make
other calls: so it is asked for memslots."""


@dataclass(frozen=True, slots=True)
class _Run:
    """What one run of the guest showed, in microseconds.

    Attributes:
        both_ways: mean of a large conversion there and one back, from answer to answer.
        chunks: of changing and discarding each chunk of them.
        waiting: of each one-page request that was answered meanwhile.
    """

    both_ways: float
    chunks: tuple[float, ...]
    waiting: tuple[float, ...]


def measure(options: Options) -> Report:
    """Measure the large conversions by themselves, and then the small ones that come in between."""
    require_kvm()
    size = _LARGE // 8 if options.quick else _LARGE
    report = Report("large", f"an explicit conversion of {format_size(size)}, to shared and back")
    for protection in _BARE_MODES:
        try:
            _measure(report, size, protection, options)
        except CannotMeasure as error:
            report.missing.append(f"{protection}: {error}")
    if not report.ratios and not report.facts:
        raise CannotMeasure("; ".join(report.missing))
    report.notes.append(
        f"chunks of {format_size(_CHUNK)}; `bare` makes the same ioctls and hole punches, without a vCPU"
    )
    return report


def _measure(report: Report, size: int, protection: str, options: Options) -> None:
    """Measure one protection: both directions, then what a page waits for meanwhile."""
    kvmd, bare = f"kvmd, {protection}", "bare calls"
    things: dict[str, Callable[[], float]] = {kvmd: lambda: _guest(size, protection, vcpus=1).both_ways}
    try:
        build_bare()
        things[bare] = lambda: _bare(size, protection)
    except CannotMeasure as error:
        if str(error) not in report.missing:
            report.missing.append(str(error))
    series = take_turns(things, rounds=options.rounds(10), unit="us")
    targets = (TARGET, 1.0) if protection == "guest-memfd" else (None, None)
    report.compare(series, bare, targets[0])
    for name, measured in series.items():
        label = name if name == kvmd else f"{bare}, {protection}"
        rates = tuple(2 * size / GIB / (us / 1e6) for us in measured.values)
        report.facts.append(Fact(Series(label, "GiB/s", rates)))
        report.figures[f"{protection}{'_bare' if name == bare else ''}_gib_per_second"] = median(rates)
    runs = [_guest(size, protection, vcpus=2) for _ in range(options.rounds(5))]
    for label, of in (("median", median), ("longest", max)):
        waits = f"one page meanwhile, {label} wait, {protection}"
        waiting = Series(waits, "us", tuple(of(run.waiting) for run in runs))
        chunk = Series(f"one chunk, {label}", "us", tuple(of(run.chunks) for run in runs))
        report.compare({waiting.label: waiting, chunk.label: chunk}, chunk.label, targets[1])


def _guest(size: int, protection: str, *, vcpus: int) -> _Run:
    spec = MachineSpec(
        image=GUESTS["large"].path,
        vcpus=vcpus,
        memory=size + 64 * MIB,
        arguments=(size // MIB, 3),
        protection=protection,
        tripwire="guest_memfd" if protection == "emulated" else "auto",
    )
    try:
        machine = Machine.open(spec)
    except HostError as error:
        raise CannotMeasure(str(error)) from error
    with machine, _timed_chunks() as chunks:
        reader = machine.records.reader()
        stop = trio.run(machine.run)
        if stop.reason is not StopReason.GUEST_EXIT or stop.status:
            raise CannotMeasure(f"kvmd stopped the guest: {stop.message}")
        _, records = reader.take(DEFAULT_CAPACITY)
    large = [record for record in records if record.vcpu == 0 and record.size_bytes > PAGE_SIZE]
    if any(record.outcome is not Outcome.CONVERTED for record in large):
        raise CannotMeasure("a large conversion failed")
    return _of_records(large, [record for record in records if record.vcpu > 0], chunks)


@contextmanager
def _timed_chunks() -> Iterator[list[tuple[int, int]]]:
    """Note when each chunk began and ended, in nanoseconds of the monotonic clock."""
    chunks = []
    make = ConversionService._make_large  # noqa: SLF001 - nothing that kvmd reports tells one chunk from the next

    def make_timed(service: ConversionService, change: Change) -> None:
        started_ns = time.monotonic_ns()
        make(service, change)
        chunks.append((started_ns, time.monotonic_ns()))

    with mock.patch.object(ConversionService, "_make_large", make_timed):
        yield chunks


def _of_records(large: list[ConversionRecord], small: list[ConversionRecord], chunks: list[tuple[int, int]]) -> _Run:
    # The first one warms up; from then on an answer is followed by the next request at once.
    elapsed_us = (large[-1].monotonic_ns - large[1].monotonic_ns) / 1000
    begin, end = large[1].monotonic_ns, large[-1].monotonic_ns
    waiting = tuple(record.waiting_ns / 1000 for record in small if begin < record.monotonic_ns < end)
    times = tuple((ended - started) / 1000 for started, ended in chunks if begin < started < end)
    return _Run(elapsed_us / (len(large) - 2) * 2, times, waiting)


@cache
def _bare_program() -> str:
    return str(build_bare())


def _bare(size: int, protection: str) -> float:
    command = [_bare_program(), _BARE_MODES[protection], str(size // MIB), "2", str(_CHUNK // MIB)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode:
        raise CannotMeasure(done.stderr.strip())
    times = json.loads(done.stdout)
    return float(times["us_to_shared"] + times["us_to_private"])
