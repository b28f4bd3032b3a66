"""QEMU's microvm with a guest that prints one line: what a start of a machine is measured beside."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bench.measure import Series

_ROOT = Path(__file__).resolve().parents[1]
_BUILD = _ROOT / "build" / "bench"
_QEMU = "qemu-system-x86_64"
_OPTIONS = (
    *("-M", "microvm,isa-serial=on", "-accel", "kvm", "-cpu", "host", "-m", "64"),
    *("-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio"),
    *("-device", "isa-debug-exit,iobase=0xf4,iosize=4"),
)


def qemu_start() -> Callable[[], float] | None:
    """Return what measures one start, as ``qemu_starts`` does; None where something is missing."""
    tools = [shutil.which(name) for name in (_QEMU, "cc", "objcopy")]
    return None if None in tools else partial(_first_byte, _firmware())


def qemu_starts(rounds: int) -> Series | None:
    """Return milliseconds from exec to the guest's first byte; None where QEMU, a compiler or objcopy is missing."""
    start = qemu_start()
    if start is None:
        return None
    start()
    return Series("qemu -M microvm", "ms", tuple(start() for _ in range(rounds)))


def _firmware() -> Path:
    _BUILD.mkdir(parents=True, exist_ok=True)
    objects, firmware = _BUILD / "firmware.o", _BUILD / "firmware.bin"
    subprocess.run(["cc", "-m32", "-c", str(Path(__file__).with_name("firmware.S")), "-o", str(objects)], check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", str(objects), str(firmware)], check=True)
    return firmware


def _first_byte(firmware: Path) -> float:
    began = time.perf_counter()
    with subprocess.Popen(
        [_QEMU, *_OPTIONS, "-bios", str(firmware)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, bufsize=0
    ) as process:
        assert process.stdout is not None  # noqa: S101 - it is a pipe
        process.stdout.read(1)
        passed = time.perf_counter() - began
        while process.stdout.read(4096):
            pass
    return passed * 1000
