"""The daemon's machines: from a request to the guest's first output, memory of idle ones, and the fleet's loop."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import structlog
import trio

from kvmd.benchmark.measure import Fact, Options, Ratio, Report, Series
from kvmd.benchmark.qemu import first_byte, qemu_firmware
from kvmd.benchmark.runs import require_kvm
from kvmd.benchmark.start import first_byte_of_run
from kvmd.fleet.local import LocalFleet, open_fleet
from kvmd.guests import GUESTS
from kvmd.spec.machine import MachineSpec

TARGET_RATIO = 1.5
"""From the request to the guest's first output, beside QEMU's microvm."""

_WHOLE = "create and start to the first output"
_QEMU, _RUN = "qemu -M microvm", "kvmd run"

_STALLED = 10
_STORM_SECONDS = 1.0
_STALLED_TARGET = 1.05

_MANY = 100
_NAP_SECONDS = 0.005


def measure(options: Options) -> Report:
    """Measure starts one after the other, and then many machines that do nothing."""
    require_kvm()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    report = Report("fleet", "machines as processes, forked by a warmed parent")
    trio.run(_measure, options, report)
    return report


async def _measure(options: Options, report: Report) -> None:
    others: dict[str, Callable[[], float]] = {}
    firmware = qemu_firmware(report)
    if firmware is not None:
        others[_QEMU] = partial(first_byte, firmware)
        report.notes.append(
            "QEMU's guest is 64 KiB of firmware that prints from its reset vector; both print through a 16550 at once"
        )
    others[_RUN] = first_byte_of_run
    async with _fleet() as fleet:
        starts, beside = await _starts(fleet, others, options.rounds(25))
    for label, series in beside.items():
        report.ratios.append(Ratio(starts[_WHOLE], series, TARGET_RATIO if label == _QEMU else None))
    report.facts += [Fact(series) for series in starts.values()]
    many = _MANY // 5 if options.quick else _MANY
    async with _fleet() as fleet:
        report.facts += await _idle(fleet, many)
    await _with_stalled_readers(options, report)
    report.notes.append(
        "requests are calls of the fleet, in its own process; the first output of builtin:hello is some milliseconds "
        "after its first instruction"
    )
    report.notes.append(f"idle: {many} machines of 64 MiB, created and not started, all at once")


@asynccontextmanager
async def _fleet() -> AsyncIterator[LocalFleet]:
    with tempfile.TemporaryDirectory() as folder:
        async with open_fleet(Path(folder)) as fleet:
            # The first one waits for the parent to import everything.
            await fleet.create(_spec("first"), owner_uid=0)
            yield fleet
            await fleet.stop_all(1)
            for machine in fleet.machines():
                await fleet.delete(machine.name)


def _spec(name: str) -> MachineSpec:
    return MachineSpec(image=GUESTS["hello"].path, name=name)


async def _starts(
    fleet: LocalFleet, others: Mapping[str, Callable[[], float]], rounds: int
) -> tuple[dict[str, Series], dict[str, Series]]:
    """Let a machine of the fleet's and the others take turns, after one that does not count."""
    created, whole, ended = [], [], []
    beside: dict[str, list[float]] = {label: [] for label in others}
    for number in range(rounds + 1):
        name = f"start-{number}"
        began = time.perf_counter()
        await fleet.create(_spec(name), owner_uid=0)
        created.append((time.perf_counter() - began) * 1000)
        async with fleet.console_output(name) as output:
            await fleet.start(name)
            async for _ in output:
                break
            whole.append((time.perf_counter() - began) * 1000)
        await fleet.wait(name, frozenset({"stopped"}))
        ended.append((time.perf_counter() - began) * 1000)
        await fleet.delete(name)
        for label, measure_other in others.items():
            beside[label].append(await trio.to_thread.run_sync(measure_other))
    starts = {"create": created, _WHOLE: whole, "create and start to the recorded end": ended}
    return _counted(starts), _counted(beside)


def _counted(rows: Mapping[str, list[float]]) -> dict[str, Series]:
    return {label: Series(label, "ms", tuple(values[1:])) for label, values in rows.items()}


async def _idle(fleet: LocalFleet, count: int) -> list[Fact]:
    """Make machines that do nothing, and look at their memory and at what they do to this loop."""
    busy: list[float] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_watch_lag, busy)
        began = time.perf_counter()
        machines = [await fleet.create(_spec(f"idle-{number}"), owner_uid=0) for number in range(count)]
        each = (time.perf_counter() - began) * 1000 / count
        nursery.cancel_scope.cancel()
    idle: list[float] = []
    with trio.move_on_after(1):
        await _watch_lag(idle)
    pss = [_pss_mib(machine.pid) for machine in machines if machine.pid is not None]
    return [
        Fact(Series("memory of an idle machine (PSS)", "MiB", tuple(pss))),
        Fact(Series(f"one of {count} creations in a row", "ms", (each,))),
        Fact(Series(f"lag of the fleet's loop while {count} are created", "ms", tuple(busy))),
        Fact(Series(f"lag of the fleet's loop with {count} idle ones", "ms", tuple(idle))),
    ]


async def _with_stalled_readers(options: Options, report: Report) -> None:
    """Let a guest convert with and without streams that nobody reads, in turns."""
    alone: list[float] = []
    stalled: list[float] = []
    async with _fleet() as fleet:
        await fleet.create(MachineSpec(image=GUESTS["echo"].path, name="storm"), owner_uid=0)
        await fleet.start("storm")
        async with fleet.console("storm") as console:
            await console.send(b"c")
            for _ in range(options.rounds(10)):
                alone.append(await _microseconds_each(fleet))
                async with AsyncExitStack() as stack:
                    for _ in range(_STALLED):
                        await stack.enter_async_context(fleet.events("storm", last_id=None))
                    # The first moments fill what lies between; after that each of them stands still.
                    await _microseconds_each(fleet)
                    stalled.append(await _microseconds_each(fleet))
    report.ratios.append(
        Ratio(
            Series(f"a conversion, {_STALLED} stalled streams", "us", tuple(stalled)),
            Series("a conversion, no stream", "us", tuple(alone)),
            _STALLED_TARGET,
        )
    )


async def _microseconds_each(fleet: LocalFleet) -> float:
    """Return the time that a conversion of the storm takes."""
    before = sum((await fleet.counters("storm")).requests.values())
    began = time.perf_counter()
    await trio.sleep(_STORM_SECONDS)
    made = sum((await fleet.counters("storm")).requests.values()) - before
    return (time.perf_counter() - began) * 1e6 / made


async def _watch_lag(into: list[float]) -> None:
    """Note how much later than asked for a task has its turn."""
    while True:
        began = time.perf_counter()
        await trio.sleep(_NAP_SECONDS)
        into.append((time.perf_counter() - began - _NAP_SECONDS) * 1000)


def _pss_mib(pid: int) -> float:
    """Return a process's share of memory (proc(5), smaps_rollup)."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    return 0.0
