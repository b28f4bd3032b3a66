"""Machines of one daemon that all convert at once, without a pause.

How many conversions a second they make together, how evenly these are shared out between machines and between the vCPUs
of one, how late the daemon's loop is, and how soon a machine answers it. Each machine is a process of its own, as ever;
the daemon's part (the fleet) runs in this process. A count is taken from each machine at the beginning and at the end,
and divided by the time between the two answers of that machine.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import msgspec
import trio

from kvmd.benchmark.fairness import jain, least_of_most
from kvmd.benchmark.measure import CannotMeasure, Fact, Options, Ratio, Report, Series
from kvmd.benchmark.runs import require_kvm
from kvmd.errors import MachineSilent
from kvmd.fleet.asking import REQUEST_SECONDS
from kvmd.fleet.local import LocalFleet, open_fleet
from kvmd.guests import GUESTS
from kvmd.spec.machine import MachineSpec

MACHINES = (1, 2, 4, 16, 64, 100)

_VCPUS = 2
_PAGES = 16
_ENDLESS = 1 << 40
"""Walks of a guest: it is stopped long before."""

_WINDOW_SECONDS = 3.0
_SETTLE_SECONDS = 1.0
"""For each guest's first walk, which cuts memory."""

_NAP_SECONDS = 0.005
_TURNS = 3
_END_SECONDS = 30.0
_SAMPLE = 1024
_LOOKED_AT = 16
"""Machines whose vCPUs are looked at, at most."""

_ATTEMPTS = 4
_ANSWER_SECONDS = _ATTEMPTS * REQUEST_SECONDS


@dataclass(slots=True)
class _Shares:
    """What some machines at once did, window by window.

    Attributes:
        total: conversions a second, of all machines together.
        machines_jain, machines_least: how evenly they were shared out between machines.
        vcpus_jain, vcpus_least: the same between the vCPUs of one machine, the median of all machines.
        lag_ms: of the daemon's loop, each nap.
        answer_ms: until each machine told its counters.
    """

    total: list[float] = field(default_factory=list)
    machines_jain: list[float] = field(default_factory=list)
    machines_least: list[float] = field(default_factory=list)
    vcpus_jain: list[float] = field(default_factory=list)
    vcpus_least: list[float] = field(default_factory=list)
    lag_ms: list[float] = field(default_factory=list)
    answer_ms: list[float] = field(default_factory=list)


def measure(options: Options) -> Report:
    """Measure one machine, and then more and more."""
    require_kvm()
    report = Report("scale", "machines that convert at once")
    counts = MACHINES[:4] if options.quick else MACHINES
    trio.run(_measure, report, counts, options)
    report.notes += [
        (
            f"each machine has {_VCPUS} vCPUs that walk {_PAGES} pages each without a pause; a window has "
            f"{_WINDOW_SECONDS:.0f} s"
        ),
        "total: beside one machine, taken in turn with it; above 1, more machines make more conversions together",
        "fairness: Jain's index (1: all the same) and the least share as a part of the largest",
        (
            "lag: how much later than asked for a task of the daemon's loop has its turn, asked every "
            f"{_NAP_SECONDS * 1000:.0f} ms; answer: how long a machine takes to tell the daemon its counters, all "
            "asked at once"
        ),
    ]
    return report


async def _measure(report: Report, counts: tuple[int, ...], options: Options) -> None:
    turns = 1 if options.quick else _TURNS
    for count in counts:
        found, alone = _Shares(), _Shares()
        try:
            for _ in range(turns):
                if count > 1:
                    await _measure_window(1, alone)
                await _measure_window(count, found)
        except CannotMeasure as error:
            report.missing.append(str(error))
            continue
        _report(report, count, found, alone)


def _report(report: Report, count: int, found: _Shares, alone: _Shares) -> None:
    label = f"{count} machine{'s' if count > 1 else ''}"
    total = Series(f"{label}, all conversions", "/s", tuple(found.total))
    if count == 1:
        report.facts.append(Fact(total))
    else:
        report.ratios.append(Ratio(total, Series("1 machine", "/s", tuple(alone.total))))
        report.facts.append(Fact(Series(f"{label}, fairness between them (Jain)", "", tuple(found.machines_jain))))
        report.facts.append(Fact(Series(f"{label}, least of the largest share", "", tuple(found.machines_least))))
    report.facts += [
        Fact(Series(f"{label}, fairness between vCPUs (Jain)", "", tuple(found.vcpus_jain))),
        Fact(Series(f"{label}, least of the largest vCPU's share", "", tuple(found.vcpus_least))),
        Fact(Series(f"{label}, lag of the daemon's loop", "ms", tuple(found.lag_ms))),
        Fact(Series(f"{label}, a machine's answer", "ms", tuple(found.answer_ms))),
    ]
    report.figures[f"machines_{count}"] = {
        "conversions_per_second": found.total,
        "machines_jain": found.machines_jain,
        "machines_least_of_most": found.machines_least,
        "vcpus_jain": found.vcpus_jain,
        "vcpus_least_of_most": found.vcpus_least,
    }


async def _measure_window(count: int, into: _Shares) -> None:
    async with _converting(count) as (fleet, names):
        await trio.sleep(_SETTLE_SECONDS)
        before = await _ask_all(fleet, names, into)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_watch_lag, into.lag_ms)
            await trio.sleep(_WINDOW_SECONDS)
            nursery.cancel_scope.cancel()
        after = await _ask_all(fleet, names, into)
        by_vcpu = [await _of_vcpus(fleet, name) for name in names[:_LOOKED_AT] if name in after]
    rates = []
    for name in before.keys() & after.keys():
        (made_before, at_before), (made, at) = before[name], after[name]
        rates.append((made - made_before) / (at - at_before))
    if len(rates) < count:
        raise CannotMeasure(f"{count - len(rates)} of {count} machines did not answer within {_ANSWER_SECONDS:.0f} s")
    into.total.append(sum(rates))
    into.machines_jain.append(jain(rates))
    into.machines_least.append(least_of_most(rates))
    into.vcpus_jain.append(median([jain(shares) for shares in by_vcpu]))
    into.vcpus_least.append(median([least_of_most(shares) for shares in by_vcpu]))


@asynccontextmanager
async def _converting(count: int) -> AsyncIterator[tuple[LocalFleet, list[str]]]:
    with tempfile.TemporaryDirectory() as folder:
        async with open_fleet(Path(folder)) as fleet:
            names = [f"machine-{number}" for number in range(count)]
            spec = MachineSpec(image=GUESTS["pingpong"].path, vcpus=_VCPUS, arguments=(_PAGES, _ENDLESS))
            try:
                for name in names:
                    await fleet.create(msgspec.structs.replace(spec, name=name), owner_uid=0)
                async with trio.open_nursery() as nursery:
                    for name in names:
                        nursery.start_soon(fleet.start, name)
                yield fleet, names
            finally:
                _kill_all(fleet)
                with trio.CancelScope(shield=True), trio.move_on_after(_END_SECONDS):
                    for machine in fleet.machines():
                        await fleet.wait(machine.name, frozenset({"stopped"}))


async def _ask_all(fleet: LocalFleet, names: list[str], into: _Shares) -> dict[str, tuple[int, float]]:
    """Ask all machines at once; return how many conversions each made so far, and when it said so."""
    answers: dict[str, tuple[int, float]] = {}

    async def ask(name: str) -> None:
        began = time.perf_counter()
        counters = await fleet.counters(name)
        answered = time.perf_counter()
        into.answer_ms.append((answered - began) * 1000)
        made = sum(number for (_, _, outcome), number in counters.requests.items() if outcome == "converted")
        answers[name] = made, answered

    async def ask_once_more(name: str) -> None:
        for _ in range(_ATTEMPTS):
            with suppress(MachineSilent):
                return await ask(name)
        return None

    async with trio.open_nursery() as nursery:
        for name in names:
            nursery.start_soon(ask_once_more, name)
    return answers


def _kill_all(fleet: LocalFleet) -> None:
    """End all machines at once: they outlive a daemon, but not a benchmark."""
    for machine in fleet.machines():
        if machine.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(machine.pid, signal.SIGKILL)


async def _of_vcpus(fleet: LocalFleet, name: str) -> list[float]:
    """Return how many of the last conversions each vCPU asked for."""
    last = await fleet.last_conversion(name)
    records = await fleet.conversions(name, since=max(0, last - _SAMPLE), limit=_SAMPLE)
    asked = Counter(record["vcpu"] for record in records if record["outcome"] == "converted")
    return [float(asked[vcpu]) for vcpu in range(_VCPUS)]


async def _watch_lag(into: list[float]) -> None:
    while True:
        began = time.perf_counter()
        await trio.sleep(_NAP_SECONDS)
        into.append((time.perf_counter() - began - _NAP_SECONDS) * 1000)
