"""QEMU's microvm with a guest that prints one line: what a machine's start and memory are measured beside."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvmd.benchmark.measure import CannotMeasure, Report
from kvmd.benchmark.sources import PROGRAMS, made_build_folder

_QEMU = "qemu-system-x86_64"
_OPTIONS = (
    # Some KVMs offer ARCH_CAPABILITIES and then refuse to set them, which ends QEMU; its guest has no use for them.
    *("-M", "microvm,isa-serial=on", "-accel", "kvm", "-cpu", "host,-arch-capabilities", "-m", "64"),
    *("-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio"),
    *("-device", "isa-debug-exit,iobase=0xf4,iosize=4"),
)
_PACKAGES = {_QEMU: "qemu-system-x86", "cc": "gcc", "objcopy": "binutils"}


def qemu_firmware(report: Report) -> Path | None:
    """Return what ``need_qemu`` does; where there is nothing to stand beside kvmd, note why and return None."""
    try:
        return need_qemu()
    except CannotMeasure as error:
        report.missing.append(str(error))
        return None


def need_qemu() -> Path:
    """Return the firmware that is QEMU's guest, built and tried.

    Raises:
        CannotMeasure: QEMU, or what builds the firmware, is not here, or does not run it.
    """
    for tool, package in _PACKAGES.items():
        if shutil.which(tool) is None:
            raise CannotMeasure(f"QEMU microvm needs {tool}: install {package}")
    source = PROGRAMS / "firmware.S"
    if not source.exists():
        raise CannotMeasure("QEMU's guest is not here: run kvmd from its source tree, where bench/ has firmware.S")
    folder = made_build_folder("QEMU's guest")
    objects, firmware = folder / "firmware.o", folder / "firmware.bin"
    for command in (
        ["cc", "-m32", "-c", str(source), "-o", str(objects)],
        ["objcopy", "-O", "binary", "-j", ".text", str(objects), str(firmware)],
    ):
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            raise CannotMeasure(f"QEMU's guest cannot be built: {_last_line(done.stderr)}")
    first_byte(firmware)
    return firmware


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
            said = process.stderr.read().decode(errors="replace")
            raise CannotMeasure(f"QEMU microvm ended before its guest said anything: {_last_line(said)}")
        yield process


def _last_line(said: str) -> str:
    return (said.strip().splitlines() or ["it said nothing"])[-1]


def _end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdout is not None  # noqa: S101 - it is a pipe
    while process.stdout.read(4096):
        pass
