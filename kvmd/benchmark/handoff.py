"""A request's way from a vCPU's thread through the conversion service and back.

Beside it a bare ping-pong of two threads over ``queue.SimpleQueue``: what Python has for waking a thread and being
woken by it; and, further down, the same over eventfds, as kvmd wakes (``kvmd.bell``). The hand-off is the whole of
kvmd's way: the ticket, the channel, the service's task and its loop, the answer, and the record; only the rules are
replaced by ones that answer at once, since what they decide, and what is changed then, is no part of handing over. The
rows after it put the rules back. Then the ways that were not taken, without service, rules and records.

Where the two threads are matters more than anything else, so it is fixed: both on one CPU, where waking a thread is
only a switch to it, or on two, where it is an interrupt to a CPU that sleeps (dear in a virtual machine). Left alone,
the kernel puts each way now here and now there, which says nothing. Each way has an event loop of its own while it is
measured.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import trio

from kvmd.benchmark.handoff_load import EVENTS_A_SECOND, REQUESTS_A_SECOND, under_load
from kvmd.benchmark.handoff_ways import (
    BARE,
    HANDOFF,
    LOADED_WAYS,
    RARE_SECONDS,
    RARE_TURNS,
    RARE_WAYS,
    TURNS,
    WARM_UP_TURNS,
    WAYS,
    YARDSTICK,
    Way,
)
from kvmd.benchmark.measure import Options, Ratio, Report, Series, take_turns

TARGET = 1.5
"""What a hand-off may cost at most, in bare ping-pongs, when idle."""

_LOADED = 40
"""Rounds while the loop serves."""

_RARE = 10
"""Rounds with a pause before each hand-off."""


def measure(options: Options) -> Report:
    """Measure all ways of handing over."""
    report = Report("handoff", "from a vCPU's thread to the service and back")
    cpus = sorted(os.sched_getaffinity(0))
    first, last = frozenset(cpus[:1]), frozenset(cpus[-1:])
    for where, asking, answering in (("one CPU", first, first), ("two CPUs", first, last)):
        if where == "two CPUs" and first == last:
            continue
        ways = {make.label: partial(_round, make, asking, answering) for make in WAYS}
        with _on(answering):
            series = take_turns(ways, rounds=options.rounds(60), unit="us")
        bare = series.pop(BARE)
        for label, measured in series.items():
            target = TARGET if label == HANDOFF else None
            report.ratios.append(Ratio(replace(measured, label=f"{label}, {where}"), bare, target))
        rare_ways = {make.label: partial(_rare_round, make, asking, answering) for make in RARE_WAYS}
        with _on(answering):
            rare = take_turns(rare_ways, rounds=options.rounds(_RARE), unit="us")
        bare = replace(rare.pop(BARE), label=f"{BARE}, after a pause")
        for label, measured in rare.items():
            report.ratios.append(Ratio(replace(measured, label=f"{label}, {where}, after a pause"), bare))
    _measure_under_load(report, cpus, options)
    report.notes.append(
        f"{TURNS} hand-offs a round, one thread asking; `{HANDOFF}` is kvmd's ConversionService with rules that "
        "answer at once; the two rows after it have its real rules, and a protection that does nothing"
    )
    report.notes.append(
        f"`after a pause`: {RARE_TURNS} a round, each after {RARE_SECONDS * 1000:.0f} ms in which nobody asked, so "
        "that the service waits in its loop; all other rows ask again at once, as a guest does that has no pause"
    )
    return report


def _measure_under_load(report: Report, cpus: list[int], options: Options) -> None:
    """Measure what kvmd has, and the yardstick, while the loop serves the API."""
    first = frozenset(cpus[:1])

    def ask(way: Way) -> float:
        return _ask(way, first, first)

    ways: dict[str, Callable[[], Way]] = {make.label: partial(_made, make, first) for make in LOADED_WAYS}
    with _on(first):
        idle = take_turns({BARE: partial(_round, YARDSTICK, first, first)}, rounds=options.rounds(_LOADED), unit="us")
        found = under_load(ways, ask, rounds=options.rounds(_LOADED), cpu=cpus[0], client_cpu=cpus[-1])
    series = {label: Series(f"{label}, loop serves", "us", tuple(values)) for label, values in found.items()}
    bare = series.pop(BARE)
    for measured in series.values():
        report.ratios.append(Ratio(measured, bare))
    report.ratios.append(Ratio(bare, replace(idle[BARE], label=f"{BARE}, idle")))
    report.notes.append(
        f"`loop serves`: on one CPU, while the service's event loop answers {REQUESTS_A_SECOND} requests a second and "
        f"streams {EVENTS_A_SECOND} events a second to a client in a process of its own; the ping-pong shares "
        "the process; the idle one was measured before, not in turn with it"
    )


@contextmanager
def _on(cpus: frozenset[int]) -> Iterator[None]:
    """Keep the calling thread, and those that it starts, on some CPUs until the block ends."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _made(make: Callable[[], Way], answering: frozenset[int]) -> Way:
    way = make()
    way.cpus = answering
    return way


def _round(make: Callable[[], Way], asking: frozenset[int], answering: frozenset[int]) -> float:
    """Return microseconds for one hand-off, made from a thread on some CPUs to an event loop on others, or the same."""
    return _measured(_made(make, answering), partial(_ask, asking=asking, answering=answering))


def _rare_round(make: Callable[[], Way], asking: frozenset[int], answering: frozenset[int]) -> float:
    """Return the same of hand-offs with pauses between."""
    way = _made(make, answering)
    way.calls = 1 + RARE_TURNS
    return _measured(way, partial(_ask_rarely, asking=asking, answering=answering))


def _measured(way: Way, ask: Callable[[Way], float]) -> float:
    async def main() -> float:
        async with trio.open_nursery() as nursery:
            await nursery.start(way.serve)
            elapsed_us = await trio.to_thread.run_sync(ask, way)
            nursery.cancel_scope.cancel()
        way.close()
        return elapsed_us

    return trio.run(main)


def _ask(way: Way, asking: frozenset[int], answering: frozenset[int]) -> float:
    os.sched_setaffinity(0, asking)
    try:
        for _ in range(WARM_UP_TURNS):
            way.call()
        started_ns = time.perf_counter_ns()
        for _ in range(TURNS):
            way.call()
        return (time.perf_counter_ns() - started_ns) / 1000 / TURNS
    finally:
        os.sched_setaffinity(0, answering)  # trio keeps the thread for others


def _ask_rarely(way: Way, asking: frozenset[int], answering: frozenset[int]) -> float:
    os.sched_setaffinity(0, asking)
    try:
        way.call()
        took_ns = 0
        for _ in range(RARE_TURNS):
            time.sleep(RARE_SECONDS)
            started_ns = time.perf_counter_ns()
            way.call()
            took_ns += time.perf_counter_ns() - started_ns
        return took_ns / 1000 / RARE_TURNS
    finally:
        os.sched_setaffinity(0, answering)  # as above
