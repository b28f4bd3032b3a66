"""The GNU toolchain, for tests that built files are what their sources give."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.gate import Facility, require


def tool(*command: str) -> str:
    """Run a program of the toolchain and return what it printed."""
    found = shutil.which(command[0])
    require(Facility.COMPILER, None if found else f"{command[0]} is not installed")
    assert found is not None
    return subprocess.run([found, *command[1:]], check=True, capture_output=True, text=True).stdout  # noqa: S603 - fixed commands


def skip_under_another(toolchain: Path, *, made: str) -> None:
    """Skip the test where compiler or linker are not those that the file records: others make other bytes."""
    recorded = toolchain.read_text()
    linker = tool("ld", "--version").splitlines()[0]
    present = f"gcc {tool('gcc', '-dumpfullversion').strip()}\n{linker}\n"
    if present != recorded:
        pytest.skip(f"{made} made by {recorded.split(chr(10))}, here is {present.split(chr(10))}")
