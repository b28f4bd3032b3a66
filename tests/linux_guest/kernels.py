"""Kernels for Linux guests in tests: where one is missing, its gate says whether that is a skip or a failure."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.gate import Facility, require
from tests.linux_guest import debian
from tests.linux_guest.debian import Kernel
from tests.linux_guest.disk import missing_tools

_LAB_KERNEL = Path(__file__).parents[2] / "lab" / "kernel"


def lab_kernel() -> Kernel:
    """Return the lab's own: everything is built in."""
    found = subprocess.run([_LAB_KERNEL], capture_output=True, text=True, check=False)  # noqa: S603 - ours
    require(Facility.LINUX, missing_tools() or (found.stderr.strip() if found.returncode else None))
    return Kernel(Path(found.stdout.strip()))


def debian_kernel() -> Kernel:
    """Return Debian's stock cloud kernel: everything is a module."""
    found = debian.find()
    missing = None if found else "Debian's kernel is not there: python -m tests.linux_guest.debian fetches it"
    require(Facility.LINUX, missing_tools() or missing)
    assert found is not None
    return found
