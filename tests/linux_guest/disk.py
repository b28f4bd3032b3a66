"""Disks of Linux guests in tests: made, and looked into, without mounting anything."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

_PLACES = "/usr/sbin:/sbin:/usr/bin:/bin"


def missing_tools() -> str | None:
    """Return which program is not here, or None."""
    for name in ("mke2fs", "debugfs"):
        if shutil.which(name, path=_PLACES) is None:
            return f"there is no {name}: install e2fsprogs"
    return None


def make_disk(path: Path, size_bytes: int, files: Mapping[str, bytes]) -> None:
    """Make a raw disk with an ext4 file system and those files in its root."""
    path.touch()
    with path.open("r+b") as file:
        file.truncate(size_bytes)
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            (Path(folder) / name).write_bytes(data)
        _run("mke2fs", "-q", "-F", "-t", "ext4", "-d", folder, str(path))


def read_file(disk: Path, name: str) -> bytes:
    """Return what a file in the root of the disk's file system holds.

    Raises:
        AssertionError: the file system is not sound, or there is no such file.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "file"
        _run("debugfs", "-R", f"dump /{name} {out}", str(disk))
        assert out.exists(), f"{name} is not on the disk"
        return out.read_bytes()


def _run(name: str, *arguments: str) -> None:
    program = shutil.which(name, path=_PLACES)
    assert program is not None, missing_tools()
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)  # noqa: S603 - e2fsprogs'
    assert done.returncode == 0, done.stderr
