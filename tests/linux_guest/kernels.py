"""Kernels for Linux guests in tests, or a skip that says how to get one."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.linux_guest import debian
from tests.linux_guest.debian import Kernel

_LAB_KERNEL = Path(__file__).parents[2] / "lab" / "kernel"


def lab_kernel() -> Kernel:
    """Return the lab's own: everything is built in."""
    found = subprocess.run([_LAB_KERNEL], capture_output=True, text=True, check=False)  # noqa: S603 - ours
    if found.returncode != 0:
        pytest.skip(found.stderr.strip())
    return Kernel(Path(found.stdout.strip()))


def debian_kernel() -> Kernel:
    """Return Debian's stock cloud kernel: everything is a module."""
    found = debian.find()
    if found is None:
        pytest.skip("Debian's kernel is not there: python -m tests.linux_guest.debian fetches it")
    return found
