"""Which kind of kernel a file is."""

from __future__ import annotations

from kvmd.errors import ImageError
from kvmd.linux.bzimage import HEADER_LIMIT, BzImage, is_bzimage, parse_bzimage
from kvmd.linux.pvh import PvhKernel, parse_pvh

Kernel = BzImage | PvhKernel

_ELF = b"\x7fELF"
_OTHERS = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\0": "xz",
    b"BZh": "bzip2",
    b"\x04\x22\x4d\x18": "lz4",
    b"\x02\x21\x4c\x18": "lz4",
    b"hsqs": "squashfs",
    b"070701": "cpio",
    b"070702": "cpio",
    b"#!": "a script",
}
"""What is given by mistake, by its first bytes."""


def parse_kernel(file: bytes) -> Kernel:
    """Return the kernel in ``file``, the bytes of a whole file.

    Raises:
        ImageError: it is none that kvmd can start; the message says what it is, or what is wrong with it.
    """
    if is_bzimage(file):
        return parse_bzimage(file)
    if file[:4] == _ELF:
        return parse_pvh(file)
    what = next((f": this is {name}" for mark, name in _OTHERS.items() if file.startswith(mark)), "")
    if not file:
        what = ": the file is empty"
    elif not what and len(file) < HEADER_LIMIT:
        what = f": {len(file)} bytes are too short for one"
    raise ImageError(f"not a Linux kernel{what}; give a bzImage (such as /boot/vmlinuz-*) or an ELF vmlinux with PVH")
