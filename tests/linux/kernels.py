"""Kernels for tests: as small as the formats allow, with nothing in them that could run."""

from __future__ import annotations

import struct

MIB = 1 << 20
SETUP_SECTORS = 3
PAYLOAD = bytes(range(256)) * 8

BOOT_FLAG = (0x1FE, "<H")
MAGIC = (0x202, "<I")
VERSION = (0x206, "<H")
LOAD_FLAGS = (0x211, "<B")
INITRD_LIMIT = (0x22C, "<I")
ALIGNMENT = (0x230, "<I")
RELOCATABLE = (0x234, "<B")
LONG_MODE = (0x236, "<H")
COMMAND_LINE_LIMIT = (0x238, "<I")
PREFERRED = (0x258, "<Q")
MEMORY_SIZE = (0x260, "<I")
PARAGRAPHS = (0x1F4, "<I")

Field = tuple[int, str]


def patched(file: bytes, field: Field, value: int) -> bytes:
    changed = bytearray(file)
    struct.pack_into(field[1], changed, field[0], value)
    return bytes(changed)


def bzimage(fields: dict[Field, int] | None = None, payload: bytes = PAYLOAD) -> bytes:
    """Return a bzImage of boot protocol 2.15 for 64 bits, relocatable, that wants to be at 16 MiB."""
    file = bytes((SETUP_SECTORS + 1) * 512) + payload
    file = patched(file, (0x1F1, "<B"), SETUP_SECTORS)
    values = {
        PARAGRAPHS: len(payload) // 16,
        BOOT_FLAG: 0xAA55,
        (0x200, "<H"): 0x6AEB,  # a jump over 0x6a bytes: the header ends at 0x26c
        MAGIC: int.from_bytes(b"HdrS", "little"),
        VERSION: 0x020F,
        LOAD_FLAGS: 1,
        INITRD_LIMIT: 0x7FFF_FFFF,
        ALIGNMENT: 2 * MIB,
        RELOCATABLE: 1,
        LONG_MODE: 1,
        COMMAND_LINE_LIMIT: 2047,
        PREFERRED: 16 * MIB,
        MEMORY_SIZE: 8 * MIB,
    } | (fields or {})
    for field, value in values.items():
        file = patched(file, field, value)
    return file


def running(code: bytes) -> bytes:
    """Return a bzImage whose 64-bit entry point is ``code``."""
    payload = bytes(0x200) + code
    return bzimage(payload=payload.ljust(-(-len(payload) // 16) * 16, b"\xf4"))


def note(owner: bytes, kind: int, contents: bytes) -> bytes:
    return (
        struct.pack("<III", len(owner), len(contents), kind)
        + owner.ljust(-(-len(owner) // 4) * 4, b"\0")
        + contents.ljust(-(-len(contents) // 4) * 4, b"\0")
    )


def vmlinux(*, entry: int | None = 16 * MIB + 0x40, gpa: int = 16 * MIB, notes: bytes | None = None) -> bytes:
    """Return an ELF kernel with one segment and, unless ``entry`` is None, a PVH entry point."""
    if notes is None:
        notes = note(b"GNU\0", 3, b"build id") + (
            b"" if entry is None else note(b"Xen\0", 18, struct.pack("<Q", entry))
        )
    identity = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header = struct.pack("<16sHHIQQQIHHHHHH", identity, 2, 62, 1, gpa, 64, 0, 0, 64, 56, 2, 64, 0, 0)
    load = struct.pack("<IIQQQQQQ", 1, 7, 0x200, 0, gpa, 256, 0x1000, 16)
    described = struct.pack("<IIQQQQQQ", 4, 4, 0x300, 0, 0, len(notes), len(notes), 4)
    return (header + load + described).ljust(0x200, b"\0") + bytes(range(256)) + notes
