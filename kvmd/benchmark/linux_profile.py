"""Where kvmd's time goes while a Linux guest boots, reads its disk, sends and takes: one run under py-spy.

The profiler reads the process's memory from outside and stops nothing, but where processors are few it takes time from
what it looks at: shares are what counts, not how long it all took. A sample counts for each thread that is on a
CPU or in the kernel but not asleep; a vCPU's in KVM_RUN is the guest's own time and its exits.
"""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from kvmd.benchmark.measure import Fact, Series
from kvmd.benchmark.profile import without_line

_RATE = 10
"""Samples a second: in the lab each takes the profiler some 20 ms."""

_PARTS = (
    ("vCPU: in KVM_RUN", ("KvmVcpu.run ",)),
    ("vCPU: exits answered, console and registers included", ("VcpuThread.main ",)),
    ("loop: frames from the guest", ("NetworkDevice._transmit ",)),
    ("loop: frames to the guest", ("NetworkDevice._receive ",)),
    ("disk: requests, in the loop and its threads", ("BlockDevice.", "kvmd/virtio/block", "kvmd/virtio/disk")),
    ("loop: other devices and their queues", ("kvmd/virtio/",)),
    ("loop: trio itself, waiting and waking", ("run (trio/_core/_run.py", "trio/")),
    ("start and end: imports, machine, files", ("",)),
)
"""Names of parts, each with what a stack of it holds; a stack belongs to the first that fits."""

_SHOWN = 12
_NO_FRAME = "outside of any Python function"
"""What starts and ends a thread, and what the profiler found half written."""


def profile(folder: Path, command: Sequence[str], run: Callable[[Sequence[str]], object]) -> tuple[list[Fact], str]:
    """Run a command under the profiler.

    Args:
        folder: for its output.
        command: kvmd.
        run: runs a command to its end, on a terminal of its own.

    Returns:
        Shares in per cent, parts first and then the functions that took most; and a note on them, or why there is none.
    """
    profiler = shutil.which("py-spy", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin")
    if profiler is None:
        return [], "no profile: py-spy is not here (pip install py-spy)"
    output = folder / "linux.folded"
    options = ["--nonblocking", "--threads", f"--rate={_RATE}", "--format=raw", f"--output={output}"]
    run([profiler, "record", *options, "--", *command])
    try:
        lines = output.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return [], "no profile: py-spy wrote none"
    parts, functions = shares(lines)
    facts = [Fact(Series(f"profile: {name}", "%", (100 * share,))) for name, share in parts]
    facts += [Fact(Series(f"profile, own time: {name}", "%", (100 * share,))) for name, share in functions[:_SHOWN]]
    return facts, f"profile: one more `kvmd run`, {_RATE} samples a second, of its threads that were not asleep"


def shares(lines: Iterable[str]) -> tuple[list[tuple[str, float]], list[tuple[str, float]]]:
    """Return the share of each part in the samples, and that of each function's own time, largest first.

    Args:
        lines: stacks, outermost first, separated by ``;``, each with its number of samples after a blank.
    """
    parts: Counter[str] = Counter({name: 0 for name, _ in _PARTS})
    functions: Counter[str] = Counter()
    for line in lines:
        stack, _, count = line.rpartition(" ")
        name = next(name for name, marks in _PARTS if any(mark in stack for mark in marks))
        parts[name] += int(count)
        *outer, last = stack.split(";")
        functions[without_line(last) if outer else _NO_FRAME] += int(count)
    total = parts.total() or 1
    return (
        [(name, number / total) for name, number in parts.most_common()],
        [(name, number / total) for name, number in functions.most_common()],
    )
