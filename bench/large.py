"""Explicit conversions of a large range on KVM's own private memory, beside the bare ioctls in a C loop.

Needs a host with KVM_X86_SW_PROTECTED_VM, such as the lab (``lab/run .venv/bin/python -m bench large``).
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from functools import cache
from statistics import median

import trio

from bench.measure import CannotMeasure, Fact, Options, Report, Series, take_turns
from bench.runs import build_bare, require_kvm
from kvmd.conversion.changes import Limits
from kvmd.conversion.messages import Outcome
from kvmd.conversion.record import ConversionRecord
from kvmd.conversion.ring import DEFAULT_CAPACITY
from kvmd.errors import HostError
from kvmd.guests import GUESTS
from kvmd.machine import Machine
from kvmd.spec import MachineSpec
from kvmd.stop import StopReason
from kvmd.units import GIB, MIB, PAGE_SIZE, format_size

TARGET = 1.3
"""What a conversion of 1 GiB may cost at most, in bare loops."""

_CHUNK = Limits().chunk_bytes
_LARGE = GIB


@dataclass(frozen=True, slots=True)
class _Run:
    """What one run of the guest showed, in microseconds.

    Attributes:
        both_ways: mean of a large conversion there and one back, from answer to answer.
        chunk: mean of changing and discarding one chunk of them.
        waiting: of each one-page request that was answered meanwhile.
    """

    both_ways: float
    chunk: float
    waiting: tuple[float, ...]


def measure(options: Options) -> Report:
    """Measure the large conversions by themselves, and then the small ones that come in between."""
    require_kvm()
    size = _LARGE // 8 if options.quick else _LARGE
    report = Report("large", f"an explicit conversion of {format_size(size)}, to shared and back")
    series = take_turns(
        {
            "kvmd": lambda: _guest(size, vcpus=1).both_ways,
            "bare ioctls": lambda: _bare(size),
        },
        rounds=options.rounds(10),
        unit="us",
    )
    report.compare(series, "bare ioctls", TARGET)
    runs = [_guest(size, vcpus=2) for _ in range(options.rounds(5))]
    waiting = Series("one page meanwhile, median wait", "us", tuple(median(run.waiting) for run in runs))
    chunk = Series("one chunk", "us", tuple(run.chunk for run in runs))
    report.compare({waiting.label: waiting, chunk.label: chunk}, chunk.label, 1.0)
    longest = Series("one page meanwhile, longest wait", "us", tuple(max(run.waiting) for run in runs))
    report.facts.append(Fact(longest))
    report.notes.append(
        f"chunks of {format_size(_CHUNK)}; `bare` makes the same ioctls and hole punches, without a vCPU"
    )
    return report


def _guest(size: int, *, vcpus: int) -> _Run:
    spec = MachineSpec(
        image=GUESTS["large"].path,
        vcpus=vcpus,
        memory=size + 64 * MIB,
        arguments=(size // MIB, 3),
        protection="guest-memfd",
    )
    try:
        machine = Machine.open(spec)
    except HostError as error:
        raise CannotMeasure(str(error)) from error
    with machine:
        reader = machine.records.reader()
        stop = trio.run(machine.run)
        if stop.reason is not StopReason.GUEST_EXIT or stop.status:
            raise CannotMeasure(f"kvmd stopped the guest: {stop.message}")
        _, records = reader.take(DEFAULT_CAPACITY)
    large = [record for record in records if record.vcpu == 0 and record.size_bytes > PAGE_SIZE]
    if any(record.outcome is not Outcome.CONVERTED for record in large):
        raise CannotMeasure("a large conversion failed")
    return _of_records(size, large, [record for record in records if record.vcpu > 0])


def _of_records(size: int, large: list[ConversionRecord], small: list[ConversionRecord]) -> _Run:
    # The first one warms up; from then on an answer is followed by the next request at once.
    elapsed_us = (large[-1].monotonic_ns - large[1].monotonic_ns) / 1000
    chunks = (len(large) - 2) * (size // _CHUNK)
    begin, end = large[1].monotonic_ns, large[-1].monotonic_ns
    work_us = sum(record.applying_us + record.discarding_us for record in large[2:])
    waiting = tuple(record.waiting_us for record in small if begin < record.monotonic_ns < end)
    return _Run(elapsed_us / (len(large) - 2) * 2, work_us / chunks, waiting)


@cache
def _bare_program() -> str:
    return str(build_bare())


def _bare(size: int) -> float:
    command = [_bare_program(), str(size // MIB), "2", str(_CHUNK // MIB)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode:
        raise CannotMeasure(done.stderr.strip())
    times = json.loads(done.stdout)
    return float(times["us_to_shared"] + times["us_to_private"])
