"""Finds the PVH entry point of an ELF kernel: bytes in, an address out, no I/O.

Sources: Xen's public headers, xen/include/public/elfnote.h (XEN_ELFNOTE_PHYS32_ENTRY), and docs/misc/pvh.markdown; the
System V gABI, "Note Section".
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from kvmd.errors import ImageError
from kvmd.payload.elf import LoadedImage, parse_elf

PHYS32_ENTRY = 18
"""The type of the note whose contents are the entry point's physical address."""

_OWNER = b"Xen\0"
_PT_NOTE = 4
_PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")
_NOTE = struct.Struct("<III")
_ENTRY_LIMIT = 1 << 32
"""The entry point is called in 32-bit mode."""

_NOTES_LIMIT = 1 << 16
"""Bytes of notes that are looked at for each program header: a kernel has some hundred."""


@dataclass(frozen=True, slots=True)
class PvhKernel:
    """An ELF kernel that starts in 32-bit protected mode.

    Attributes:
        image: what it loads.
        entry: gpa of its first instruction, below 4 GiB.
    """

    image: LoadedImage
    entry: int


def parse_pvh(file: bytes) -> PvhKernel:
    """Return what ``file``, the bytes of a whole ELF kernel, loads, and where it starts.

    Raises:
        ImageError: it is no ELF file that can be loaded, or has no PVH entry point.
    """
    try:
        image = parse_elf(file)
    except ImageError as error:
        raise ImageError(f"the kernel cannot be loaded: {error}") from error
    for owner, kind, contents in _notes(file):
        if (owner, kind) == (_OWNER, PHYS32_ENTRY) and len(contents) in {4, 8}:
            entry = int.from_bytes(contents, "little")
            inside = any(segment.gpa <= entry < segment.end for segment in image.segments)
            if entry >= _ENTRY_LIMIT or not inside:
                raise ImageError(f"the kernel's PVH entry point {entry:#x} is outside every segment, or above 4 GiB")
            return PvhKernel(image, entry)
    raise ImageError(
        "the ELF file has no PVH entry point (a note XEN_ELFNOTE_PHYS32_ENTRY): build the kernel with CONFIG_PVH, or "
        "give its bzImage; a payload guest's file is its image, not its kernel"
    )


def _notes(file: bytes) -> Iterator[tuple[bytes, int, bytes]]:
    """Yield owner, type and contents of each note; what is damaged ends its segment's."""
    # parse_elf has checked that the program headers lie within the file.
    table_offset, count = struct.unpack_from("<Q", file, 0x20)[0], struct.unpack_from("<H", file, 0x38)[0]
    for index in range(count):
        kind, _, offset, _, _, size, _, _ = _PROGRAM_HEADER.unpack_from(file, table_offset + index * 56)
        if kind != _PT_NOTE:
            continue
        segment = file[offset : offset + min(size, _NOTES_LIMIT)]
        at = 0
        while at + _NOTE.size <= len(segment):
            owner_size, contents_size, type_ = _NOTE.unpack_from(segment, at)
            owner_at = at + _NOTE.size
            contents_at = owner_at + _aligned(owner_size)
            if contents_at + contents_size > len(segment):
                break
            yield (
                segment[owner_at : owner_at + owner_size],
                type_,
                segment[contents_at : contents_at + contents_size],
            )
            at = contents_at + _aligned(contents_size)


def _aligned(size: int) -> int:
    return (size + 3) & ~3
