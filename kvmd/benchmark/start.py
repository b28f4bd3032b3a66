"""From ``python -m kvmd run builtin:hello`` to the guest's first byte of output.

Beside it what Python itself takes to its first byte, with and without the two libraries that kvmd cannot do without.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence

from kvmd.benchmark.measure import CannotMeasure, Fact, Options, Ratio, Report, take_turns
from kvmd.benchmark.runs import require_kvm
from kvmd.benchmark.sources import ROOT, build_folder

TARGET_SECONDS = 0.5
"""To the guest's first instruction, imports included."""

_KVMD = ("-m", "kvmd", "run", "builtin:hello", "--log-level", "error")
_IMPORT_LINE = re.compile(r"import time:\s+(\d+) \|\s+(\d+) \|(\s+)(\S+)")
_SLOWEST = 8


def measure(options: Options) -> Report:
    """Measure the time from exec to the first byte."""
    require_kvm()
    report = Report("start", "from exec to the guest's first output")
    kvmd, python, libraries = "kvmd run builtin:hello", "python -c print", "python -c 'import trio, structlog'"
    series = take_turns(
        {
            kvmd: lambda: _first_byte(_KVMD),
            python: lambda: _first_byte(("-c", "print(1)")),
            libraries: lambda: _first_byte(("-c", "import trio, structlog; print(1)")),
        },
        rounds=options.rounds(25),
        unit="ms",
    )
    report.facts.append(Fact(series[kvmd], TARGET_SECONDS * 1000))
    report.ratios += [Ratio(series[kvmd], series[python]), Ratio(series[kvmd], series[libraries])]
    report.notes.append(
        "the guest prints after its first instruction, so this is a little more than what the target speaks of; all "
        "with warm caches and compiled bytecode"
    )
    report.notes.append("slowest imports of `kvmd run` (by itself, under -X importtime): " + ", ".join(_imports()))
    return report


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
