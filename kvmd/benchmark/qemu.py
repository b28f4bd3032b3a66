"""QEMU's microvm with a guest that prints one line: what a machine's start and memory are measured beside."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from kvmd.benchmark.measure import CannotMeasure, Series
from kvmd.benchmark.sources import PROGRAMS, build_folder

_QEMU = "qemu-system-x86_64"
_OPTIONS = (
    *("-M", "microvm,isa-serial=on", "-accel", "kvm", "-cpu", "host", "-m", "64"),
    *("-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio"),
    *("-device", "isa-debug-exit,iobase=0xf4,iosize=4"),
)
_PACKAGES = {_QEMU: "qemu-system-x86", "cc": "gcc", "objcopy": "binutils"}


def need_qemu() -> Path:
    """Return the firmware that is QEMU's guest, built.

    Raises:
        CannotMeasure: QEMU, or what builds the firmware, is not here.
    """
    for tool, package in _PACKAGES.items():
        if shutil.which(tool) is None:
            raise CannotMeasure(f"QEMU microvm needs {tool}: install {package}")
    source = PROGRAMS / "firmware.S"
    if not source.exists():
        raise CannotMeasure("QEMU's guest is not here: run kvmd from its source tree, where bench/ has firmware.S")
    folder = build_folder()
    folder.mkdir(parents=True, exist_ok=True)
    objects, firmware = folder / "firmware.o", folder / "firmware.bin"
    for command in (
        ["cc", "-m32", "-c", str(source), "-o", str(objects)],
        ["objcopy", "-O", "binary", "-j", ".text", str(objects), str(firmware)],
    ):
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            raise CannotMeasure(f"QEMU's guest cannot be built: {done.stderr.strip().splitlines()[-1]}")
    return firmware


def qemu_start() -> Callable[[], float] | None:
    """Return what measures one start, as ``qemu_starts`` does; None where something is missing."""
    try:
        return partial(first_byte, need_qemu())
    except CannotMeasure:
        return None


def qemu_starts(rounds: int) -> Series | None:
    """Return milliseconds from exec to the guest's first byte; None where QEMU, a compiler or objcopy is missing."""
    start = qemu_start()
    if start is None:
        return None
    start()
    return Series("qemu -M microvm", "ms", tuple(start() for _ in range(rounds)))


def first_byte(firmware: Path) -> float:
    """Return milliseconds from exec to the guest's first byte."""
    began = time.perf_counter()
    with _running(firmware) as process:
        passed = time.perf_counter() - began
        _end(process)
    return passed * 1000


@contextmanager
def idle(firmware: Path) -> Iterator[int]:
    """Run QEMU until the block ends, its guest stopped after its first output; yield its process's id."""
    with _running(firmware, "-no-shutdown", "-action", "shutdown=pause") as process:
        try:
            yield process.pid
        finally:
            process.kill()


@contextmanager
def _running(firmware: Path, *more: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        [_QEMU, *_OPTIONS, *more, "-bios", str(firmware)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
    ) as process:
        assert process.stdout is not None and process.stderr is not None  # noqa: S101, PT018 - they are pipes
        if not process.stdout.read(1):
            raise CannotMeasure(f"QEMU microvm ended: {process.stderr.read().decode(errors='replace').strip()}")
        yield process


def _end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdout is not None  # noqa: S101 - it is a pipe
    while process.stdout.read(4096):
        pass
