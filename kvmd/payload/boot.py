"""Where things lie in a payload's memory when it starts, and what its vCPUs find: numbers and bytes, no I/O.

The contract with the guest is ``docs/payload-abi.md``. Page tables follow AMD64 APM volume 2, 5.3 (long mode,
four levels): entries of 8 bytes, 512 a table; the C-bit is a bit of the physical address in every entry.
"""

from __future__ import annotations

import struct
import sys
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kvmd.errors import ConfigError, ImageError
from kvmd.hv.vcpu import Registers
from kvmd.ranges import GpaRange
from kvmd.units import GIB, MIB, PAGE_MASK, PAGE_SIZE, format_size, page_ceil, page_floor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmd.payload.elf import LoadedImage

SHARED_OFFSET = 1 << 46
"""Bytes from the private view of a page to its shared view, in a guest's virtual addresses."""

MAX_ARGUMENTS = 8
"""Numbers that a payload can be given."""

STACK_SIZE = 16 << 10
"""Bytes of each vCPU's stack."""

BOOT_MAGIC = 0x31304F464E49564B
"""``KVINFO01`` in memory order."""

_BOOT_VERSION = 1
_ARGUMENTS_FOLLOW = 1 << 0
_BOOT_INFORMATION = struct.Struct(f"<QIIQQQII{MAX_ARGUMENTS}Q")

_PRESENT_WRITABLE_USER = 0x7
_LARGE = 0x80
_TABLE_SIZE = PAGE_SIZE
_ENTRY_SIZE = 8
_LOW_HALF = (1 << 32) - 1
_TABLE_ENTRIES = _TABLE_SIZE // _ENTRY_SIZE
_TWO_MIB = 2 * MIB
_LEAST_COVERAGE = 4 * GIB
_ROUND_FROM = 16 * MIB
"""From this memory size on the first free byte is a multiple of 2 MiB: slots and mappings can stay large."""

_LOW_START = PAGE_SIZE
"""The lowest address for kvmd's own area: page 0 stays unused, so that a null pointer hits nothing of it."""

_RFLAGS = 0x3002
"""IOPL 3 and the bit that is always set; interrupts off."""

_MAX_ARGUMENT = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Write:
    """Bytes to put into private memory before the start.

    Attributes:
        gpa: where, without the C-bit.
        data: what.
    """

    gpa: int
    data: memoryview


@dataclass(frozen=True, slots=True)
class BootLayout:
    """How a machine with a payload starts.

    Attributes:
        memory_size: bytes; memory is ``[0, memory_size)``.
        c_bit: position of the C-bit, or None where the machine has one view.
        shared_offset: ``SHARED_OFFSET``, or 0 where the machine has one view.
        system: kvmd's own area: page tables, boot information, stacks.
        boot_information: gpa of the boot information.
        stacks: the stack of each vCPU.
        first_free: from here on memory is the guest's; below it is pinned private. Page-aligned.
        cr3: of every vCPU, C-bit included.
        cpl: privilege level of every vCPU.
        registers: the initial registers of each vCPU.
        writes: the image and kvmd's own area; memory not named here is zero.
    """

    memory_size: int
    c_bit: int | None
    shared_offset: int
    system: GpaRange
    boot_information: int
    stacks: tuple[GpaRange, ...]
    first_free: int
    cr3: int
    cpl: Literal[0, 3]
    registers: tuple[Registers, ...]
    writes: tuple[Write, ...]

    @property
    def pinned(self) -> GpaRange:
        """Memory that must stay private: the image and kvmd's own area."""
        return GpaRange(0, self.first_free)

    @property
    def free(self) -> GpaRange | None:
        """Memory that is the guest's to convert, or None where there is none."""
        if self.first_free == self.memory_size:
            return None
        return GpaRange(self.first_free, self.memory_size)


def plan_boot(
    image: LoadedImage,
    *,
    memory_size: int,
    vcpus: int,
    c_bit: int | None,
    gigabyte_pages: bool,
    cpl: Literal[0, 3] = 3,
    arguments: Sequence[int] = (),
) -> BootLayout:
    """Lay out the memory of a machine that starts ``image``.

    Args:
        image: the payload.
        memory_size: bytes of memory, a multiple of the page size.
        vcpus: number of vCPUs, at least 1.
        c_bit: position of the C-bit in a guest-physical address, or None for a machine with one view.
        gigabyte_pages: the vCPUs know pages of 1 GiB (CPUID 0x80000001, EDX bit 26).
        cpl: privilege level that the vCPUs start at.
        arguments: up to ``MAX_ARGUMENTS`` unsigned 64-bit numbers for the guest.

    Raises:
        ConfigError: the numbers themselves cannot be meant.
        ImageError: the memory is too small for the image and kvmd's own area.
    """
    _check_request(memory_size, vcpus, c_bit, arguments)
    tables = _TablePlan.of(memory_size, c_bit, gigabyte_pages=gigabyte_pages)
    system = _place_system(image, memory_size, _system_size(tables, vcpus))
    if system is None:
        least = _least_memory(image, vcpus, c_bit, gigabyte_pages=gigabyte_pages)
        raise ImageError(
            f"{memory_size} bytes of memory are too few for this image with {vcpus} vCPUs: "
            f"at least {least} ({format_size(least)}) are needed"
        )
    private_bit = 0 if c_bit is None else 1 << c_bit
    boot_information = system.start + tables.size_bytes
    stacks_start = boot_information + PAGE_SIZE
    stacks = tuple(GpaRange.of_size(stacks_start + index * STACK_SIZE, STACK_SIZE) for index in range(vcpus))
    first_free = _first_free(max(page_ceil(image.end), system.end), memory_size)
    shared_offset = 0 if c_bit is None else SHARED_OFFSET
    information = _BOOT_INFORMATION.pack(
        BOOT_MAGIC,
        _BOOT_VERSION,
        vcpus,
        memory_size,
        shared_offset,
        first_free,
        c_bit or 0,
        _ARGUMENTS_FOLLOW,
        *arguments,
        *(0,) * (MAX_ARGUMENTS - len(arguments)),
    )
    writes = [Write(segment.gpa, segment.data) for segment in image.segments if segment.data]
    writes.append(Write(system.start, tables.build(system.start, private_bit)))
    writes.append(Write(boot_information, memoryview(information)))
    return BootLayout(
        memory_size=memory_size,
        c_bit=c_bit,
        shared_offset=shared_offset,
        system=system,
        boot_information=boot_information,
        stacks=stacks,
        first_free=first_free,
        cr3=system.start | private_bit,
        cpl=cpl,
        registers=tuple(
            Registers(rdi=index, rsi=boot_information, rsp=stack.end, rip=image.entry, rflags=_RFLAGS)
            for index, stack in enumerate(stacks)
        ),
        writes=tuple(writes),
    )


def _check_request(memory_size: int, vcpus: int, c_bit: int | None, arguments: Sequence[int]) -> None:
    if memory_size <= 0 or memory_size & PAGE_MASK:
        raise ConfigError(f"{memory_size} bytes of memory: give a positive multiple of {PAGE_SIZE}")
    limit = _memory_limit(c_bit)
    if memory_size > limit:
        reason = "the shared view starts there" if limit == SHARED_OFFSET else f"address bit {c_bit} is the C-bit"
        raise ConfigError(f"{format_size(memory_size)} of memory is too much: at most {format_size(limit)}, {reason}")
    if c_bit is not None and not 32 <= c_bit < 52:  # noqa: PLR2004 - what AMD64 APM volume 2, 5.3 has above 4 GiB
        raise ConfigError(f"C-bit {c_bit}: give a bit of a guest-physical address above 4 GiB, 32 to 51")
    if vcpus < 1:
        raise ConfigError(f"{vcpus} vCPUs: give at least 1")
    if len(arguments) > MAX_ARGUMENTS:
        raise ConfigError(f"{len(arguments)} arguments for the guest: at most {MAX_ARGUMENTS} can be given")
    for argument in arguments:
        if not 0 <= argument <= _MAX_ARGUMENT:
            raise ConfigError(f"argument {argument} for the guest: give a number from 0 to {_MAX_ARGUMENT}")


def _memory_limit(c_bit: int | None) -> int:
    """Return the most memory, in bytes, whose two views do not meet."""
    return SHARED_OFFSET if c_bit is None else min(SHARED_OFFSET, 1 << c_bit)


def _system_size(tables: _TablePlan, vcpus: int) -> int:
    """Return the bytes of kvmd's own area: page tables, boot information, stacks."""
    return tables.size_bytes + PAGE_SIZE + vcpus * STACK_SIZE


def _place_system(image: LoadedImage, memory_size: int, size_bytes: int) -> GpaRange | None:
    """Return where kvmd's own area goes: after the image, else before it, else nowhere."""
    image_end = page_ceil(image.end)
    if image_end + size_bytes <= memory_size:
        return GpaRange.of_size(image_end, size_bytes)
    if image_end <= memory_size and _LOW_START + size_bytes <= page_floor(image.start):
        return GpaRange.of_size(_LOW_START, size_bytes)
    return None


def _least_memory(image: LoadedImage, vcpus: int, c_bit: int | None, *, gigabyte_pages: bool) -> int:
    """Return the least memory, in bytes, that a layout is found for."""
    least = page_ceil(image.end)
    while True:  # more memory can need more tables, 4 KiB for each GiB, so this ends soon
        size = _system_size(_TablePlan.of(least, c_bit, gigabyte_pages=gigabyte_pages), vcpus)
        if _place_system(image, least, size) is not None:
            return least
        least = page_ceil(image.end) + size


def _first_free(used_end: int, memory_size: int) -> int:
    """Return the start of the guest's own memory, given the end of the image and of kvmd's area."""
    rounded = -(-used_end // _TWO_MIB) * _TWO_MIB
    return rounded if memory_size >= _ROUND_FROM and rounded <= memory_size else used_end


@dataclass(frozen=True, slots=True)
class _TablePlan:
    """Page tables of one PML4 and, for each view, PDPTs and (without 1 GiB pages) page directories.

    In memory: the PML4, then per view its PDPTs and then its page directories.

    Attributes:
        gigabytes: GiB that each view maps: the memory and at least a byte more, so that an access just
            outside it reaches the VMM; at least 4.
        views: 1, or 2 with the shared view.
        gigabyte_pages: leaves are PDPT entries of 1 GiB, else page-directory entries of 2 MiB.
    """

    gigabytes: int
    views: int
    gigabyte_pages: bool

    @classmethod
    def of(cls, memory_size: int, c_bit: int | None, *, gigabyte_pages: bool) -> _TablePlan:
        """Return the plan for a machine of ``memory_size`` bytes."""
        covered = min(_memory_limit(c_bit), max(_LEAST_COVERAGE, memory_size + 1))
        return cls(-(-covered // GIB), 1 if c_bit is None else 2, gigabyte_pages)

    @property
    def _pointer_tables(self) -> int:
        """PDPTs of one view: each covers 512 GiB."""
        return -(-self.gigabytes // _TABLE_ENTRIES)

    @property
    def _directories(self) -> int:
        """Page directories of one view: each covers 1 GiB."""
        return 0 if self.gigabyte_pages else self.gigabytes

    @property
    def size_bytes(self) -> int:
        """Bytes of all tables."""
        return (1 + self.views * (self._pointer_tables + self._directories)) * _TABLE_SIZE

    def build(self, gpa: int, private_bit: int) -> memoryview:
        """Return the tables for a PML4 at ``gpa``. They are private memory, so links carry the C-bit."""
        tables = bytearray(self.size_bytes)
        link = gpa | private_bit | _PRESENT_WRITABLE_USER
        table = _TABLE_SIZE  # offset of the next table to fill
        for view in range(self.views):
            leaf = (0 if view else private_bit) | _PRESENT_WRITABLE_USER | _LARGE
            top = view * (SHARED_OFFSET // (_TABLE_ENTRIES * GIB)) * _ENTRY_SIZE
            _put(tables, top, _links(link + table, self._pointer_tables))
            pointers = table
            table += self._pointer_tables * _TABLE_SIZE
            if self.gigabyte_pages:
                _put(tables, pointers, _leaves(leaf, GIB, self.gigabytes))
                continue
            _put(tables, pointers, _links(link + table, self._directories))
            _put(tables, table, _leaves(leaf, _TWO_MIB, self.gigabytes * _TABLE_ENTRIES))
            table += self._directories * _TABLE_SIZE
        return memoryview(tables).toreadonly()


def _put(tables: bytearray, offset: int, entries: bytes) -> None:
    tables[offset : offset + len(entries)] = entries


def _links(first: int, count: int) -> bytes:
    """Return ``count`` entries that name tables one after the other, ``first`` being the first entry."""
    return struct.pack(f"<{count}Q", *range(first, first + count * _TABLE_SIZE, _TABLE_SIZE))


def _leaves(first: int, page_size: int, count: int) -> bytes:
    """Return ``count`` entries that map pages from address 0 on, ``first`` being the first entry.

    One by one, the million of them that map 1 TiB take a quarter of a second. But the low halves repeat every
    4 GiB, and the high ones are the same for 4 GiB: both can be written in strides.
    """
    pages = 4 * GIB // page_size
    groups = -(-count // pages)
    low, high = first & _LOW_HALF, first >> 32
    entries = array("I", bytes(groups * pages * _ENTRY_SIZE))
    entries[0::2] = array("I", range(low, low + 4 * GIB, page_size)) * groups
    for group in range(groups):
        start, end = 2 * group * pages, 2 * (group + 1) * pages
        entries[start + 1 : end : 2] = array("I", [high + group]) * pages
    if sys.byteorder == "big":
        entries.byteswap()
    return entries[: 2 * count].tobytes()
