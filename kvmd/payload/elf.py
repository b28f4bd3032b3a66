"""Reads the ELF file of a payload: bytes in, segments out, no I/O.

Sources: System V gABI, "Object Files" (the ELF header) and "Program Loading" (program headers), and the
x86-64 psABI for EM_X86_64. Only the ELF header and the program headers are looked at; sections are the
linker's.

pyelftools 0.33 was tried first, on bad inputs like those of ``tests/payload/test_elf.py``. It hands out the
data of a truncated segment silently short, takes an ``e_phnum`` of 0xffff as no segments, raises
OverflowError on offsets of 2^63 and more, and leaves type, machine, overlap and address checks to its caller;
importing it takes some 70 ms. What would be left for it to do is two ``struct.unpack`` calls.
"""

from __future__ import annotations

import itertools
import struct
from dataclasses import dataclass

from kvmd.errors import ImageError
from kvmd.units import MIB, PAGE_SIZE

LOAD_BASE = MIB
"""The lowest gpa that a payload is linked at, in bytes."""

_LOWEST_GPA = LOAD_BASE - PAGE_SIZE
"""A linker may put one page with the file's headers just before the first section."""

_GPA_END = 1 << 46
"""No machine has more memory than this, in bytes: the shared view starts there."""

_MAX_PROGRAM_HEADERS = 64
"""A payload has a handful; more is a damaged or hostile file."""

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")

_CLASS_NAMES = {1: "32-bit (ELFCLASS32)"}
_DATA_NAMES = {2: "big-endian (ELFDATA2MSB)"}
_TYPE_HINTS = {
    1: "ET_REL, an object file: link it",
    3: "ET_DYN: link with -static -no-pie",
    4: "ET_CORE, a core dump: give the program",
}
_MACHINE_NAMES = {
    3: "EM_386: compile with -m64",
    8: "EM_MIPS",
    20: "EM_PPC",
    21: "EM_PPC64",
    22: "EM_S390",
    40: "EM_ARM",
    183: "EM_AARCH64",
    243: "EM_RISCV",
    258: "EM_LOONGARCH",
}

_ELFCLASS64 = 2
_ELFDATA2LSB = 1
_EV_CURRENT = 1
_ET_EXEC = 2
_EM_X86_64 = 62
_PT_LOAD = 1
_PT_INTERP = 3


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of memory to load.

    Attributes:
        gpa: where it starts, in bytes; not aligned.
        memory_size: its length in bytes; never zero.
        data: the bytes at its start, at most ``memory_size``; zeros follow.
    """

    gpa: int
    memory_size: int
    data: memoryview

    @property
    def end(self) -> int:
        """One past its last byte."""
        return self.gpa + self.memory_size


@dataclass(frozen=True, slots=True)
class LoadedImage:
    """What a payload's file asks for.

    Attributes:
        entry: gpa of the first instruction, within a segment.
        segments: at least one; sorted by gpa, none overlapping.
    """

    entry: int
    segments: tuple[Segment, ...]

    @property
    def start(self) -> int:
        """Gpa of the first byte of the first segment."""
        return self.segments[0].gpa

    @property
    def end(self) -> int:
        """One past the last byte of the last segment."""
        return self.segments[-1].end


def parse_elf(file: bytes) -> LoadedImage:
    """Return what ``file``, the bytes of a whole ELF file, loads; the segments are views of it.

    Raises:
        ImageError: the file is not one that a machine can start; the message says what would be.
    """
    entry, table_offset, count = _parse_header(file)
    segments: list[Segment] = []
    for index in range(count):
        fields = _PROGRAM_HEADER.unpack_from(file, table_offset + index * _PROGRAM_HEADER.size)
        kind, _, offset, _, gpa, file_size, memory_size, _ = fields
        if kind == _PT_INTERP:
            raise ImageError("the image wants a dynamic linker (PT_INTERP): link with -static -no-pie")
        if kind != _PT_LOAD:
            continue
        segment = _parse_segment(file, index, offset, gpa, file_size, memory_size)
        if segment is not None:
            segments.append(segment)
    if not segments:
        raise ImageError("the image has nothing to load: no PT_LOAD program header with memory in it")
    segments.sort(key=lambda segment: segment.gpa)
    for lower, upper in itertools.pairwise(segments):
        if upper.gpa < lower.end:
            raise ImageError(
                f"segments [{lower.gpa:#x}, {lower.end:#x}) and [{upper.gpa:#x}, {upper.end:#x}) overlap: "
                "give each physical addresses (p_paddr) of its own"
            )
    if not any(segment.gpa <= entry < segment.end for segment in segments):
        raise ImageError(
            f"the entry point {entry:#x} is outside every segment: physical addresses (p_paddr) count, "
            f"here {segments[0].gpa:#x} to {segments[-1].end:#x}"
        )
    return LoadedImage(entry, tuple(segments))


def _parse_header(file: bytes) -> tuple[int, int, int]:
    """Return the entry point, and the offset and number of program headers, which all lie within the file."""
    if file[:4] != b"\x7fELF":
        raise ImageError("the image is not an ELF file: it does not begin with 7f 45 4c 46")
    if len(file) < _HEADER.size:
        raise ImageError(f"the image is truncated: {len(file)} bytes, an ELF header alone has {_HEADER.size}")
    identity, kind, machine, _, entry, table_offset, _, _, _, entry_size, count, *_ = _HEADER.unpack_from(file)
    _check_identity(identity)
    if machine != _EM_X86_64:
        found = _MACHINE_NAMES.get(machine, f"e_machine {machine}")
        raise ImageError(f"the image is not for x86-64 (EM_X86_64) but {found}")
    if kind != _ET_EXEC:
        raise ImageError(f"the image is not ET_EXEC but {_TYPE_HINTS.get(kind, f'e_type {kind}')}")
    if count == 0:
        raise ImageError("the image has no program headers: link it as an executable")
    if count > _MAX_PROGRAM_HEADERS:  # PN_XNUM, 0xffff, among them: the real count would be in section 0
        raise ImageError(f"the image has {count} program headers: at most {_MAX_PROGRAM_HEADERS} are taken")
    if entry_size != _PROGRAM_HEADER.size:
        raise ImageError(f"the image's program headers have {entry_size} bytes: ELF64 has {_PROGRAM_HEADER.size}")
    end = table_offset + count * entry_size
    if end > len(file):
        raise ImageError(f"the image is truncated: its program headers end at byte {end} of a file of {len(file)}")
    return entry, table_offset, count


def _check_identity(identity: bytes) -> None:
    """Refuse another class, byte order or version than those of x86-64."""
    elf_class, encoding, version = identity[4], identity[5], identity[6]
    if elf_class != _ELFCLASS64:
        found = _CLASS_NAMES.get(elf_class, f"of class {elf_class}")
        raise ImageError(f"the image is {found}: an ELF64 is needed (-m64)")
    if encoding != _ELFDATA2LSB:
        found = _DATA_NAMES.get(encoding, f"of data encoding {encoding}")
        raise ImageError(f"the image is {found}: a little-endian one is needed")
    if version != _EV_CURRENT:
        raise ImageError(f"the image is of ELF version {version}: only version {_EV_CURRENT} is known")


def _parse_segment(file: bytes, index: int, offset: int, gpa: int, file_size: int, memory_size: int) -> Segment | None:
    """Return the segment of program header ``index``, or None where it holds no memory."""
    if memory_size < file_size:
        raise ImageError(
            f"segment {index} has {file_size} bytes in the file but {memory_size} in memory: "
            "p_memsz must not be below p_filesz"
        )
    if memory_size == 0:
        return None
    if gpa < _LOWEST_GPA:
        raise ImageError(
            f"segment {index} is loaded at {gpa:#x}, below 1 MiB: link at {LOAD_BASE:#x} "
            f"(-Wl,-Ttext-segment={LOAD_BASE:#x})"
        )
    if gpa + memory_size > _GPA_END:
        raise ImageError(f"segment {index}, {memory_size} bytes at {gpa:#x}, ends above {_GPA_END:#x} (64 TiB)")
    if offset + file_size > len(file):
        raise ImageError(
            f"the image is truncated: segment {index} ends at byte {offset + file_size} of a file of {len(file)}"
        )
    return Segment(gpa, memory_size, memoryview(file)[offset : offset + file_size])
