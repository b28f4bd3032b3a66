"""A machine from its creation to its guest, and what an idle one has in memory: beside QEMU's microvm.

`warmed` is a daemon that runs already, asked over its API; `cold` one that is started for this machine, so that its
machines' parent still imports everything; `kvmd run` has no daemon and imports everything itself. All are timed to the
guest's first byte of output, which comes a little after its first instruction.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from kvmd.benchmark.measure import CannotMeasure, Fact, Options, Ratio, Report, Series, take_turns
from kvmd.benchmark.post import Client, daemon
from kvmd.benchmark.qemu import first_byte, idle, qemu_firmware
from kvmd.benchmark.resident import pss_mib, rss_mib
from kvmd.benchmark.runs import require_kvm
from kvmd.benchmark.sources import ROOT, build_folder

TARGET_WARMED = 1.0
"""What a start on a warmed daemon may take at most, in starts of QEMU."""

TARGET_RUN_MS = 500.0
"""What `kvmd run` may take at most."""

_WARMED, _COLD, _RUN = "warmed daemon", "cold daemon", "kvmd run builtin:hello"
_QEMU = "qemu -M microvm"
_PYTHON, _LIBRARIES = "python -c print", "python -c 'import trio, structlog'"
_KVMD = ("-m", "kvmd", "run", "builtin:hello", "--log-level", "error")
_IMPORT_LINE = re.compile(r"import time:\s+(\d+) \|\s+(\d+) \|(\s+)(\S+)")
_SLOWEST = 8
_IDLE = 10
"""Idle machines at once, whose parent's memory they share."""

_SETTLE_SECONDS = 1.0
_TURNS, _COLD_TURNS, _IDLE_TURNS = 25, 5, 5


def measure(options: Options) -> Report:
    """Measure starts in turns, and then memory in turns."""
    require_kvm()
    report = Report("start", "from its creation to the guest's first output, and memory when idle")
    firmware = qemu_firmware(report)
    _measure_starts(report, firmware, options)
    _measure_memory(report, firmware, options)
    report.notes += [
        (
            "QEMU's guest is 64 KiB of firmware that prints from its reset vector; kvmd's (builtin:hello, 64 MiB) "
            "prints after its start-up code; all with warm caches and compiled bytecode"
        ),
        "slowest imports of `kvmd run` (by itself, under -X importtime): " + ", ".join(_imports()),
        (
            "memory: PSS counts what processes have in common with its part, what kvmd's have with the daemon and with "
            "this Python, and QEMU's with any other, too; one machine beside one QEMU, and each of "
            f"{_IDLE} machines, whose processes are forks of one parent; no guest runs: kvmd's (builtin:echo) has "
            "run and was paused, QEMU's has ended and left it paused"
        ),
    ]
    return report


def _measure_starts(report: Report, firmware: Path | None, options: Options) -> None:
    with ExitStack() as stack:
        client = Client(stack.enter_context(daemon(_folder(stack))))
        client.first_output()  # the first one waits for the machines' parent to import everything
        things: dict[str, Callable[[], float]] = {_WARMED: client.first_output}
        if firmware is not None:
            things[_QEMU] = lambda: first_byte(firmware)
        things |= {
            _RUN: first_byte_of_run,
            _PYTHON: lambda: _first_byte(("-c", "print(1)")),
            _LIBRARIES: lambda: _first_byte(("-c", "import trio, structlog; print(1)")),
        }
        series = take_turns(things, rounds=options.rounds(_TURNS), unit="ms")
        created = Series(f"{_WARMED}: of which creating", "ms", tuple(client.created[2:]))
    cold = {_COLD: _cold_start, _RUN: first_byte_of_run}
    if firmware is not None:
        cold[_QEMU] = lambda: first_byte(firmware)
    colds = take_turns(cold, rounds=options.rounds(_COLD_TURNS), unit="ms", warm_up=False)
    report.facts += [Fact(created), Fact(series[_RUN], TARGET_RUN_MS)]
    report.ratios += [Ratio(colds[_COLD], colds[_RUN])]
    if firmware is not None:
        report.ratios[:0] = [
            Ratio(series[_WARMED], series[_QEMU], TARGET_WARMED),
            Ratio(colds[_COLD], colds[_QEMU]),
            Ratio(series[_RUN], series[_QEMU]),
        ]
    else:
        report.facts.insert(0, Fact(series[_WARMED]))
    report.ratios += [Ratio(series[_RUN], series[_PYTHON]), Ratio(series[_RUN], series[_LIBRARIES])]


def _folder(stack: ExitStack) -> Path:
    return Path(stack.enter_context(tempfile.TemporaryDirectory()))


def _cold_start() -> float:
    """Return milliseconds from the daemon's exec to its first machine's first output."""
    passed: list[float] = []
    with ExitStack() as stack:
        began = time.perf_counter()
        path = stack.enter_context(daemon(_folder(stack)))
        Client(path).first_output(then=lambda: passed.append((time.perf_counter() - began) * 1000))
    return passed[0]


def _measure_memory(report: Report, firmware: Path | None, options: Options) -> None:
    rows: dict[str, list[float]] = {}

    def note(label: str, value: float) -> None:
        rows.setdefault(label, []).append(value)

    for _ in range(options.rounds(_IDLE_TURNS)):
        with ExitStack() as stack:
            client = Client(stack.enter_context(daemon(_folder(stack))))
            pids = [client.create_idle("idle-0")]
            time.sleep(_SETTLE_SECONDS)
            note("one", pss_mib(pids[0]))
            note("one, resident", rss_mib(pids[0]))
            pids += [client.create_idle(f"idle-{number}") for number in range(1, _IDLE)]
            time.sleep(_SETTLE_SECONDS)
            note("many", sum(map(pss_mib, pids)) / len(pids))
        if firmware is not None:
            with idle(firmware) as pid:
                time.sleep(_SETTLE_SECONDS)
                note("qemu", pss_mib(pid))
                note("qemu, resident", rss_mib(pid))
            with ExitStack() as stack:
                pids = [stack.enter_context(idle(firmware)) for _ in range(_IDLE)]
                time.sleep(_SETTLE_SECONDS)
                note("qemu, many", sum(map(pss_mib, pids)) / len(pids))
    labels = {
        "one": ("an idle machine, PSS", "qemu"),
        "one, resident": ("an idle machine, resident", "qemu, resident"),
        "many": (f"each of {_IDLE} idle machines, PSS", "qemu, many"),
    }
    for key, (label, beside) in labels.items():
        subject = Series(label, "MiB", tuple(rows[key]))
        if beside in rows:
            report.ratios.append(Ratio(subject, Series(_QEMU, "MiB", tuple(rows[beside]))))
        else:
            report.facts.append(Fact(subject))


def first_byte_of_run() -> float:
    """Return milliseconds from before `kvmd run builtin:hello` until the guest's first byte."""
    return _first_byte(_KVMD)


def _environment() -> dict[str, str]:
    """Return this process's, but with bytecode that is kept: an installed kvmd has it."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "PYTHONPATH": str(ROOT), "PYTHONPYCACHEPREFIX": str(build_folder() / "pycache")}


def _first_byte(arguments: Sequence[str]) -> float:
    """Return milliseconds from before exec until the program's first byte on stdout."""
    started = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=_environment(),
        bufsize=0,
    ) as process:
        assert process.stdout is not None  # noqa: S101 - it is a pipe
        first = process.stdout.read(1)
        passed = time.perf_counter() - started
        while process.stdout.read(4096):
            pass
    if not first or process.returncode:
        raise CannotMeasure(f"{' '.join(arguments)} printed nothing, or ended with {process.returncode}")
    return passed * 1000


def _imports() -> list[str]:
    """Return the modules whose own code takes longest to import, with milliseconds."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *_KVMD], capture_output=True, text=True, check=True, env=_environment()
    )
    own = [(int(found[1]), found[4]) for found in _IMPORT_LINE.finditer(done.stderr)]
    return [f"{name} {us / 1000:.1f} ms" for us, name in sorted(own, reverse=True)[:_SLOWEST]]
