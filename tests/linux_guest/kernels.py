"""Kernels for Linux guests in tests: where one is missing, its gate says whether that is a skip or a failure."""

from __future__ import annotations

import dataclasses
import lzma
import struct
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


def unpacked(kernel: Kernel, folder: Path) -> Kernel:
    """Return the ELF file that a bzImage unpacks, which starts by PVH, written into the folder.

    Where it lies: Documentation/arch/x86/boot.rst, "payload_offset" and "payload_length".
    """
    file = kernel.image.read_bytes()
    offset, size = struct.unpack_from("<II", file, 0x248)
    start = (file[0x1F1] + 1) * 512 + offset
    image = folder / "vmlinux"
    # What follows the compressed data is its size.
    image.write_bytes(lzma.LZMADecompressor(format=lzma.FORMAT_XZ).decompress(file[start : start + size]))
    return dataclasses.replace(kernel, image=image)


def debian_kernel() -> Kernel:
    """Return Debian's stock cloud kernel: everything is a module."""
    found = debian.find()
    missing = None if found else "Debian's kernel is not there: python -m tests.linux_guest.debian fetches it"
    require(Facility.LINUX, missing_tools() or missing)
    assert found is not None
    return found
