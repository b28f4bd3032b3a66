"""A Linux guest on kvmd beside QEMU's microvm: time to init, and what its disk and network carry.

In the lab, where guest kernels run on its processor::

    LAB_CPUS=1 LAB_TIMEOUT=3600 lab/run .venv/bin/kvmd bench linux
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from kvmd.benchmark.kernel_mode import EMULATED_NS, kernel_instruction_ns
from kvmd.benchmark.measure import CannotMeasure, Options, Report
from kvmd.benchmark.runs import require_kvm
from kvmd.benchmark.sources import LINUX_GUEST, ROOT
from kvmd.errors import BackendError, HostError

IN_THE_LAB = "LAB_CPUS=1 LAB_TIMEOUT=3600 lab/run .venv/bin/kvmd bench linux"

_QEMU = "qemu-system-x86_64"


def measure(options: Options) -> Report:
    """Let kvmd and QEMU take turns with the same guest.

    Raises:
        CannotMeasure: this host lacks something, or its KVM emulates guest kernels; the message says what to do.
    """
    require_kvm()
    if not LINUX_GUEST.is_dir():
        raise CannotMeasure("the Linux guest is not here: run kvmd from its source tree, where tests/linux_guest is")
    try:
        nanoseconds = kernel_instruction_ns()
    except BackendError as error:
        raise CannotMeasure(f"this host's KVM runs no guest kernel: {error}") from error
    if nanoseconds > EMULATED_NS:
        raise CannotMeasure(
            f"this host's KVM emulates guest kernels ({nanoseconds:,.0f} ns an instruction), and Linux would take "
            f"minutes to boot; in the lab: {IN_THE_LAB}"
        )
    kernel = subprocess.run([ROOT / "lab" / "kernel"], capture_output=True, text=True, check=False)
    if kernel.returncode != 0:
        raise CannotMeasure(kernel.stderr.strip())
    program = shutil.which(_QEMU)
    if program is None:
        raise CannotMeasure(f"there is no {_QEMU}: install qemu-system-x86")
    sys.path.insert(0, str(ROOT))
    from kvmd.benchmark.linux_turns import turns  # noqa: PLC0415 - it imports the tests'

    try:
        return turns(options, qemu=program, kernel=Path(kernel.stdout.strip()))
    except (HostError, OSError) as error:
        raise CannotMeasure(f"there is no network for a guest: {error}") from error
