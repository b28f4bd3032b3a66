"""Host memory that a machine takes before its guest touches any: the kernel's share, and kvmd's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvmd.benchmark.measure import CannotMeasure, Fact, Options, Report, Series
from kvmd.benchmark.runs import require_kvm, timed_open
from kvmd.benchmark.sources import ROOT
from kvmd.errors import KvmdError
from kvmd.guests import GUESTS
from kvmd.spec.machine import MachineSpec
from kvmd.units import GIB, MIB, TIB, format_size

_KEYS = ("MemAvailable", "VmallocUsed", "Slab")
_SETTLE_SECONDS = 1.0
"""How long the kernel may take to free what the machine before had: it does so after the process has ended."""

_UNITS = {"available": "MiB", "vmalloc": "MiB", "slab": "MiB", "rss": "MiB", "open": "ms", "close": "ms"}
_TEXT = {
    "available": "fall of available memory",
    "vmalloc": "growth of the kernel's vmalloc memory",
    "slab": "growth of the kernel's slab memory",
    "rss": "kvmd's resident memory",
    "open": "time to open",
    "close": "time to close",
}


def measure(options: Options) -> Report:
    """Open machines of growing memory in a process each, and look at what the host lost."""
    require_kvm()
    report = Report("memory", "host memory of a machine that has not run yet")
    sizes = [64 * MIB, GIB, 64 * GIB] + ([TIB] if options.large else [])
    for size in sizes:
        rounds = 1 if size >= TIB else options.rounds(5)
        rows = [_open_and_look(size) for _ in range(rounds)]
        for key, unit in _UNITS.items():
            label = f"{format_size(size)}: {_TEXT[key]}"
            report.facts.append(Fact(Series(label, unit, tuple(row[key] for row in rows))))
    report.notes.append(
        "available memory fell by kvmd's own memory too, and by that of whatever else ran at that moment; "
        "vmalloc memory is where KVM keeps what it knows of each page"
    )
    if not options.large:
        report.notes.append("--large measures 1 TiB too")
    return report


def _open_and_look(size: int) -> dict[str, float]:
    """Open a machine in a process of its own, and return MiB and milliseconds."""
    time.sleep(_SETTLE_SECONDS)
    before = _meminfo()
    with _machine(size) as found:
        during = _meminfo()
    return {
        "available": (before["MemAvailable"] - during["MemAvailable"]) / 1024,
        "vmalloc": (during["VmallocUsed"] - before["VmallocUsed"]) / 1024,
        "slab": (during["Slab"] - before["Slab"]) / 1024,
        **found,
    }


@contextmanager
def _machine(size: int) -> Iterator[dict[str, float]]:
    with subprocess.Popen(
        [sys.executable, "-m", "kvmd.benchmark.memory", str(size)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:
        stdin, stdout, stderr = process.stdin, process.stdout, process.stderr
        assert stdin is not None and stdout is not None and stderr is not None  # noqa: S101, PT018 - they are pipes
        opened = stdout.readline()
        if not opened:
            raise CannotMeasure(stderr.read().strip())
        found: dict[str, float] = json.loads(opened)
        yield found
        stdin.close()
        found.update(json.loads(stdout.readline()))


def _meminfo() -> dict[str, int]:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return {key: int(line.split()[1]) for line in lines for key in _KEYS if line.startswith(f"{key}:")}


def _hold(size: int) -> None:
    """Open a machine, say what it took, and hold it until stdin ends: the process that is looked at."""
    try:
        seconds, machine = timed_open(MachineSpec(image=GUESTS["hello"].path, memory=size))
    except KvmdError as error:
        sys.exit(str(error))
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    resident_kib = next(int(line.split()[1]) for line in status if line.startswith("VmRSS:"))
    print(json.dumps({"open": seconds * 1000, "rss": resident_kib / 1024}), flush=True)
    sys.stdin.read()
    started = time.perf_counter()
    machine.close()
    print(json.dumps({"close": (time.perf_counter() - started) * 1000}), flush=True)


if __name__ == "__main__":
    _hold(int(sys.argv[1]))
