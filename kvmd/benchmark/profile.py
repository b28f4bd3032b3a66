"""Where the time of a conversion goes: kvmd under a sampling profiler, py-spy, while `pingpong` converts.

The profiler reads the process's memory from outside and stops nothing, so what it sees is kvmd as it is. A sample
counts for each thread that is on a CPU or in the kernel but not asleep; in KVM_RUN that is the guest's own time and its
exits.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from kvmd.benchmark.measure import CannotMeasure, Fact, Options, Report, Series
from kvmd.benchmark.runs import require_kvm
from kvmd.benchmark.sources import ROOT, made_build_folder

_ROUNDS = 400
_ROUNDS_QUICK = 60
_RATE = 500
_SHOWN = 24
_SECONDS = 300
_LINE_NUMBER = re.compile(r":\d+\)")

_THREADS = {"service": "ConversionService.run ", "vCPU": "VcpuThread.main "}
"""Threads, each with the function that its conversions happen under."""

_WAITS = ("RequestChannel.linger ", "ConversionService.request ")
"""Where the two wait for each other, at a bell: py-spy takes a thread that is blocked in read(2) for one that works."""


def measure(options: Options) -> Report:
    """Profile one run for a table, and one for a flame graph."""
    require_kvm()
    profiler = shutil.which("py-spy")
    if profiler is None:
        raise CannotMeasure("py-spy is not here: pip install py-spy (it needs root, or a process that may be traced)")
    folder = made_build_folder("a profile")
    rounds = _ROUNDS_QUICK if options.quick else _ROUNDS
    raw, graph = folder / "conversion.folded", folder / "conversion.svg"
    _record(profiler, "raw", raw, rounds)
    _record(profiler, "flamegraph", graph, rounds)
    report = Report("profile", "where the time of a conversion goes")
    shares = own_time(raw.read_text(encoding="utf-8").splitlines())
    for (thread, function), share in list(shares.items())[:_SHOWN]:
        report.facts.append(Fact(Series(f"{thread}: {function}", "%", (100 * share,))))
    report.figures["own_time"] = {f"{thread}: {function}": share for (thread, function), share in shares.items()}
    report.notes.append(
        f"pingpong, 1 vCPU, 16 pages, {rounds} rounds; {_RATE} samples a second; own time, without what a function "
        f"calls, of all samples of these threads together but those of their waits for each other (`linger`, "
        f"`request`), which the flame graph shows, too: {graph.relative_to(folder.parent)}"
    )
    return report


def _record(profiler: str, kind: str, output: Path, rounds: int) -> None:
    command = [profiler, "record", "--nonblocking", "--threads", f"--rate={_RATE}", f"--format={kind}"]
    guest = ["-m", "kvmd", "run", "builtin:pingpong", "--arg", "16", "--arg", str(rounds), "--log-level", "error"]
    done = subprocess.run(
        [*command, f"--output={output}", "--", sys.executable, *guest],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=_SECONDS,
    )
    if done.returncode or not output.exists():
        said = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()
        raise CannotMeasure(f"py-spy: {said[-1]}")
    if kind == "flamegraph":
        # Its title is the whole command line.
        text = output.read_text(encoding="utf-8")
        for whole, short in ((sys.executable, "python"), (profiler, "py-spy"), (str(output), output.name)):
            text = text.replace(whole, short)
        output.write_text(text, encoding="utf-8")


def own_time(lines: Iterable[str]) -> dict[tuple[str, str], float]:
    """Return each function's share of the samples, by thread and function, largest first.

    Args:
        lines: stacks, outermost first, separated by ``;``, each with its number of samples after a blank. What is not
            under one of ``_THREADS`` is left out (imports, setting up, taking down), and so are the waits of these.
    """
    samples: Counter[tuple[str, str]] = Counter()
    for line in lines:
        stack, _, count = line.rpartition(" ")
        for thread, root in _THREADS.items():
            frames = stack.split(";")
            if any(frame.startswith(root) for frame in frames) and not frames[-1].startswith(_WAITS):
                samples[thread, without_line(frames[-1])] += int(count)
    total = samples.total()
    return {key: number / total for key, number in samples.most_common()}


def without_line(frame: str) -> str:
    """Return a frame of py-spy's without the number of its line: function and file."""
    return _LINE_NUMBER.sub(")", frame)
