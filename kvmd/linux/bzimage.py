"""Reads a bzImage: bytes in, what the 64-bit boot protocol needs to know of it out, no I/O.

Source: the kernel's Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header" and "64-bit Boot Protocol".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from kvmd.errors import ImageError

HEADER_START = 0x1F1
"""Of the setup header, in the file and in the zero page."""

_BOOT_FLAG_AT = 0x1FE
_BOOT_FLAG = 0xAA55
_JUMP_AT = 0x200
_MAGIC_AT = 0x202
_MAGIC = b"HdrS"
HEADER_LIMIT = 0x290
"""The zero page has the e820 table's space behind it; no header has come near."""

_SECTOR = 512
_DEFAULT_SETUP_SECTORS = 4
_PARAGRAPH = 16
_LEAST_VERSION = 0x020C
"""Linux 3.8: the first whose header says whether the kernel has a 64-bit entry point."""

_LOADED_HIGH = 1 << 0
_XLF_KERNEL_64 = 1 << 0
_ENTRY_64_OFFSET = 0x200

_FIELDS = struct.Struct("<BHIHHHH")  # setup_sects, root_flags, syssize, ram_size, vid_mode, root_dev, boot_flag
_TAIL = struct.Struct("<4sH")  # header, version


@dataclass(frozen=True, slots=True)
class BzImage:
    """A kernel with the boot protocol's header.

    Attributes:
        header: the setup header as it is in the file, from ``HEADER_START`` on.
        payload: the protected-mode code, which unpacks the kernel.
        preferred_address: where it wants to be, in bytes.
        alignment: of the address where it may be otherwise; 0 where it may not.
        memory_size: what it needs from its address on, in bytes, before it looks at the memory map.
        initrd_limit: one past the highest address that an initrd may have.
        command_line_limit: bytes of the longest command line, without its end.
    """

    header: bytes
    payload: memoryview
    preferred_address: int
    alignment: int
    memory_size: int
    initrd_limit: int
    command_line_limit: int

    @property
    def entry_offset(self) -> int:
        """Of the 64-bit entry point, from where the payload lies."""
        return _ENTRY_64_OFFSET


def is_bzimage(file: bytes) -> bool:
    """Tell whether ``file`` begins like an x86 boot image, whole or not."""
    return file[_MAGIC_AT : _MAGIC_AT + len(_MAGIC)] == _MAGIC


def parse_bzimage(file: bytes) -> BzImage:
    """Return what ``file``, the bytes of a whole bzImage, says of itself.

    Raises:
        ImageError: it is truncated, too old, or has no 64-bit entry point.
    """
    if len(file) < HEADER_LIMIT:
        raise ImageError(f"the kernel is truncated: {len(file)} bytes, the header of a bzImage alone needs more")
    setup_sectors, _, paragraphs, _, _, _, boot_flag = _FIELDS.unpack_from(file, HEADER_START)
    magic, version = _TAIL.unpack_from(file, _MAGIC_AT)
    if boot_flag != _BOOT_FLAG or magic != _MAGIC:
        raise ImageError("the kernel is no bzImage: its boot sector has not the marks of one")
    if version < _LEAST_VERSION:
        raise ImageError(
            f"the kernel has boot protocol {version >> 8}.{version & 0xFF:02}: 2.12 (Linux 3.8) or later is needed"
        )
    if not file[0x211] & _LOADED_HIGH:
        raise ImageError("the kernel is a zImage, which must lie in low memory: build a bzImage")
    (long_mode,) = struct.unpack_from("<H", file, 0x236)
    if not long_mode & _XLF_KERNEL_64:
        raise ImageError("the kernel has no 64-bit entry point (XLF_KERNEL_64): build it for x86-64 (CONFIG_64BIT)")
    start = ((setup_sectors or _DEFAULT_SETUP_SECTORS) + 1) * _SECTOR
    size = paragraphs * _PARAGRAPH
    if size == 0 or start + size > len(file):
        raise ImageError(f"the kernel is truncated: it says that it has {start + size} bytes, the file has {len(file)}")
    (initrd_highest, alignment, relocatable) = struct.unpack_from("<IIB", file, 0x22C)
    (command_line_limit,) = struct.unpack_from("<I", file, 0x238)
    preferred, memory_size = struct.unpack_from("<QI", file, 0x258)
    if relocatable and (alignment == 0 or alignment & (alignment - 1)):
        raise ImageError(f"the kernel is damaged: its alignment is {alignment:#x}, which is no power of two")
    # The byte after the jump's opcode is how far it jumps: to the end of the header (boot.rst, "Details").
    header_end = min(_JUMP_AT + 2 + file[_JUMP_AT + 1], HEADER_LIMIT)
    return BzImage(
        header=bytes(file[HEADER_START:header_end]),
        payload=memoryview(file)[start:],
        preferred_address=preferred,
        alignment=alignment if relocatable else 0,
        memory_size=max(memory_size, len(file) - start),
        initrd_limit=initrd_highest + 1,
        command_line_limit=command_line_limit,
    )
