"""What a benchmark takes from the source tree that kvmd runs from: C programs, and what needs the tests' guests.

An installed kvmd has none of it; then its own figures have nothing beside them, and a line says why.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from pathlib import Path

from kvmd.benchmark.measure import CannotMeasure

ROOT = Path(__file__).resolve().parents[2]
"""The source tree, where there is one."""

PROGRAMS = ROOT / "bench"
"""Where the C programs are."""

LINUX_GUEST = ROOT / "tests" / "linux_guest"
"""Where the Linux guest is that `kvmd bench linux` boots."""


def build_folder() -> Path:
    """Return where what is built goes: the source tree's ``build/bench``, or ``$KVMD_BENCH_BUILD``."""
    # The lab's root file system is read-only but for one folder.
    return Path(os.environ.get("KVMD_BENCH_BUILD", ROOT / "build" / "bench"))


def made_build_folder(what: str) -> Path:
    """Return the folder, made and looked at: ``what`` is to be built there. Raises CannotMeasure."""
    folder = build_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "it cannot be written")
    except OSError as error:
        raise CannotMeasure(
            f"{what} cannot be built in {folder}: {error.strerror}: "
            "name a folder that can be written in KVMD_BENCH_BUILD"
        ) from error
    return folder


def build_floor() -> Path:
    """Return the C program that runs a guest as kvmd does, compiled where it is older than its sources.

    Raises:
        CannotMeasure: as ``compiled``.
    """
    return compiled("floor", "floor*.[ch]")


def build_bare() -> Path:
    """Return the loop of bare ioctls, compiled where it is older than its source.

    Raises:
        CannotMeasure: as ``compiled``.
    """
    return compiled("bare", "bare.c")


def compiled(name: str, pattern: str) -> Path:
    """Return one of the C programs.

    Args:
        name: of the program.
        pattern: of its sources' names.

    Raises:
        CannotMeasure: its sources or a C compiler are missing, or it cannot be compiled.
    """
    sources = sorted(PROGRAMS.glob(pattern))
    if not sources:
        raise CannotMeasure(f"the C program `{name}` is not here: run kvmd from its source tree, where bench/ has it")
    folder = build_folder()
    program = folder / name
    if program.exists() and all(program.stat().st_mtime > source.stat().st_mtime for source in sources):
        return program
    compiler = shutil.which("cc")
    if compiler is None:
        raise CannotMeasure(f"the C program `{name}` needs a C compiler: install gcc")
    code = [str(source) for source in sources if source.suffix == ".c"]
    made_build_folder(f"the C program `{name}`")
    # Aside and renamed: another run of it may be going on.
    aside = folder / f"{name}.{os.getpid()}"
    command = [compiler, "-O2", "-Wall", "-Wextra", "-pthread", "-o", str(aside), *code]
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
            raise CannotMeasure(f"the C program `{name}` cannot be compiled: {first}")
        aside.rename(program)
    finally:
        aside.unlink(missing_ok=True)
    return program
