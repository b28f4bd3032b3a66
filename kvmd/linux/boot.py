"""Where a Linux guest's kernel, initrd and tables lie when it starts, and what its first vCPU finds: no I/O.

Sources: the kernel's Documentation/arch/x86/boot.rst ("64-bit Boot Protocol") and zero-page.rst; for PVH Xen's
docs/misc/pvh.markdown and xen/include/public/arch-x86/hvm/start_info.h.

Low memory holds what kvmd prepares, all of it the guest's to reuse once it has looked::

    0x1000  descriptor table            0x7000  boot parameters ("zero page"), or PVH's start information
    0x9000  page tables of the first 4 GiB       0x20000  command line
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kvmd.errors import ConfigError, ImageError
from kvmd.hv.vcpu import Registers
from kvmd.linux.address_map import (
    ACPI_TABLES,
    CONVENTIONAL_END,
    LOW_MEMORY_END,
    RESET_VECTOR,
    memory_ranges,
)
from kvmd.linux.bzimage import HEADER_START, BzImage
from kvmd.linux.kernel import Kernel
from kvmd.linux.pvh import PvhKernel
from kvmd.ranges import GpaRange
from kvmd.units import GIB, MIB, PAGE_SIZE, format_size, page_ceil, page_floor

_GDT = 0x1000
_PARAMETERS = 0x7000
_PAGE_TABLES = 0x9000
_COMMAND_LINE = 0x2_0000
_COMMAND_LINE_LIMIT = CONVENTIONAL_END - _COMMAND_LINE - 1
_PVH_COMMAND_LINE_LIMIT = 2047
"""COMMAND_LINE_SIZE of x86, less the end: a PVH kernel does not say what it takes."""

_LEAST_MEMORY = 16 * MIB

_FLAT_CODE_64 = 0x00AF_9B00_0000_FFFF
_FLAT_CODE_32 = 0x00CF_9B00_0000_FFFF
_FLAT_DATA = 0x00CF_9300_0000_FFFF

_PRESENT_WRITABLE = 0x3
_LARGE = 0x80
_MAPPED_GIGABYTES = 4

_MEMORY, _RESERVED, _ACPI = 1, 2, 3
"""Types of the e820 table and of PVH's memory map (ACPI 6.5, 15.4)."""

_E820 = struct.Struct("<QQI")
_PVH_ENTRY = struct.Struct("<QQII")
_PVH_START = struct.Struct("<IIIIQQQQII")
_PVH_MODULE = struct.Struct("<QQQQ")
_PVH_MAGIC = 0x336E_C578
_PVH_VERSION = 1

_ACPI_RSDP_AT = 0x070
_EXTRA_POINTERS_AT = 0x0C0
_E820_COUNT_AT = 0x1E8
_VIDEO_MODE_AT = 0x1FA
_LOADER_AT = 0x210
_RAMDISK_AT = 0x218
_COMMAND_LINE_AT = 0x228
_E820_AT = 0x2D0
_VIDEO_NORMAL = 0xFFFF
_UNDEFINED_LOADER = 0xFF

_RFLAGS = 0x2


@dataclass(frozen=True, slots=True)
class LinuxWrite:
    """Bytes to put into memory before the start; where nothing is put there are zeros.

    Attributes:
        gpa: where.
        data: what.
    """

    gpa: int
    data: bytes | memoryview


@dataclass(frozen=True, slots=True)
class LinuxBoot:
    """How a Linux guest starts.

    Attributes:
        protocol: how its kernel is entered.
        memory: where memory lies.
        mode: the processor's mode.
        gdt: address and size in bytes of the descriptor table.
        cr3: the page tables, in ``long`` mode.
        registers: of the first vCPU; the guest starts the others.
        writes: what is put into memory.
    """

    protocol: Literal["64-bit", "pvh"]
    memory: tuple[GpaRange, ...]
    mode: Literal["long", "protected"]
    gdt: tuple[int, int]
    cr3: int
    registers: Registers
    writes: tuple[LinuxWrite, ...]


def plan_linux(
    kernel: Kernel,
    *,
    memory_size: int,
    initrd: bytes = b"",
    command_line: str = "",
    acpi: LinuxWrite | None = None,
    reset_port: tuple[int, int] | None = None,
) -> LinuxBoot:
    """Lay out the memory of a machine that starts ``kernel``.

    Args:
        kernel: as ``parse_kernel`` returned it.
        memory_size: bytes of memory, a multiple of the page size.
        initrd: the initial RAM disk; empty for none.
        command_line: the kernel's.
        acpi: ACPI's tables, which begin with the RSDP; None for a machine without.
        reset_port: a port, and the value that resets the machine when it is written there; None for none.

    Raises:
        ConfigError: the command line is too long, or no ASCII.
        ImageError: kernel and initrd do not fit into the memory; the message says how much would do.
    """
    line = _encoded(command_line, kernel)
    memory = memory_ranges(memory_size)
    if memory_size < _LEAST_MEMORY:
        raise ImageError(f"{format_size(memory_size)} of memory are too few for Linux: give at least 16M, better 256M")
    rsdp = 0 if acpi is None else acpi.gpa
    area = _kernel_area(kernel, memory[0].end)
    ramdisk = _place_initrd(initrd, area, memory[0].end, kernel)
    writes = [LinuxWrite(_COMMAND_LINE, line + b"\0")]
    if acpi is not None:
        writes.append(acpi)
    if reset_port is not None:
        writes.append(LinuxWrite(RESET_VECTOR, _reset_code(*reset_port)))
    if ramdisk is not None:
        writes.append(LinuxWrite(ramdisk, initrd))
    if isinstance(kernel, BzImage):
        gdt = struct.pack("<4Q", 0, 0, _FLAT_CODE_64, _FLAT_DATA)
        writes += [
            LinuxWrite(_GDT, gdt),
            LinuxWrite(_PARAMETERS, _zero_page(kernel, memory, ramdisk, len(initrd), rsdp)),
            LinuxWrite(_PAGE_TABLES, _page_tables()),
            LinuxWrite(area.start, kernel.payload),
        ]
        registers = Registers(rsi=_PARAMETERS, rip=area.start + kernel.entry_offset, rflags=_RFLAGS)
        return LinuxBoot("64-bit", memory, "long", (_GDT, len(gdt)), _PAGE_TABLES, registers, tuple(writes))
    gdt = struct.pack("<4Q", 0, 0, _FLAT_CODE_32, _FLAT_DATA)
    writes += [
        LinuxWrite(_GDT, gdt),
        LinuxWrite(_PARAMETERS, _start_information(memory, ramdisk, len(initrd), rsdp)),
        *(LinuxWrite(segment.gpa, segment.data) for segment in kernel.image.segments if segment.data),
    ]
    registers = Registers(rbx=_PARAMETERS, rip=kernel.entry, rflags=_RFLAGS)
    return LinuxBoot("pvh", memory, "protected", (_GDT, len(gdt)), 0, registers, tuple(writes))


def _reset_code(port: int, value: int) -> bytes:
    """Return what a processor runs that was sent to the reset vector, in real mode.

    There is no firmware; but a kernel that finds no better way leaves the reset to it (``BOOT_BIOS`` of the kernel's
    arch/x86/kernel/reboot.c, which Linux 7.3 was seen to take first), and would run through memory for ever.
    """
    # mov dx, port; mov al, value; out dx, al; cli; hlt; jmp to the hlt
    return b"\xba" + struct.pack("<H", port) + b"\xb0" + bytes((value,)) + b"\xee\xfa\xf4\xeb\xfd"


def _encoded(command_line: str, kernel: Kernel) -> bytes:
    try:
        line = command_line.encode("ascii")
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"cmdline: {command_line[error.start]!r} is no ASCII: the kernel takes nothing else"
        ) from None
    if b"\0" in line or b"\n" in line:
        raise ConfigError("cmdline: it must be one line without NUL characters")
    limit = _PVH_COMMAND_LINE_LIMIT
    if isinstance(kernel, BzImage):
        limit = min(kernel.command_line_limit, _COMMAND_LINE_LIMIT)
    if len(line) > limit:
        raise ConfigError(f"cmdline: {len(line)} characters are too many: this kernel takes at most {limit}")
    return line


def _kernel_area(kernel: Kernel, low_end: int) -> GpaRange:
    """Return the memory that the kernel takes before it knows what memory there is.

    Raises:
        ImageError: there is not enough.
    """
    if isinstance(kernel, PvhKernel):
        if kernel.image.end > low_end:
            raise _too_small(kernel.image.end)
        return GpaRange(page_floor(kernel.image.start), page_ceil(kernel.image.end))
    size = page_ceil(kernel.memory_size)
    # As the kernel itself reckons (boot.rst, "init_size"): put below where it wants to be, it moves up to there.
    alignment = max(kernel.alignment, PAGE_SIZE)
    start = -(-max(kernel.preferred_address, MIB) // alignment) * alignment
    if start + size > low_end:
        raise _too_small(start + size)
    return GpaRange.of_size(start, size)


def _too_small(needed: int) -> ImageError:
    if needed > LOW_MEMORY_END:
        return ImageError(
            f"the kernel wants memory up to {needed:#x}: more than the {format_size(LOW_MEMORY_END)} "
            "that a machine has below the devices; it is damaged, or not for this machine"
        )
    return ImageError(
        f"the memory is too small for this kernel: it needs {format_size(-(-needed // MIB) * MIB)} before it has "
        "started; give twice that or more"
    )


def _place_initrd(initrd: bytes, kernel_area: GpaRange, low_end: int, kernel: Kernel) -> int | None:
    """Return where the initrd goes: as high as the kernel takes it, clear of the kernel; None where there is none."""
    if not initrd:
        return None
    highest = min(kernel.initrd_limit, LOW_MEMORY_END) if isinstance(kernel, BzImage) else LOW_MEMORY_END
    limit = min(low_end, highest)
    size = page_ceil(len(initrd))
    gpa = page_floor(limit) - size
    if gpa >= kernel_area.end:
        return gpa
    # Below the kernel, as far as one of old habits wants to be high.
    gpa = page_floor(min(limit, kernel_area.start)) - size
    if gpa >= MIB:
        return gpa
    needed = kernel_area.end + size
    if needed > highest:
        raise ImageError(
            f"the initrd of {format_size(len(initrd))} does not fit below {highest:#x}, where this kernel wants it"
        )
    raise ImageError(
        f"the initrd of {format_size(len(initrd))} does not fit beside the kernel: give at least "
        f"{format_size(-(-needed // MIB) * MIB)} of memory, better twice that"
    )


def _memory_map(memory: Sequence[GpaRange]) -> list[tuple[int, int, int]]:
    """Return start, size in bytes and type of what the kernel has to know of."""
    low = memory[0]
    return [
        (0, CONVENTIONAL_END, _MEMORY),
        (ACPI_TABLES.start, ACPI_TABLES.size_bytes, _ACPI),
        (MIB, low.end - MIB, _MEMORY),
        *((range_.start, range_.size_bytes, _MEMORY) for range_ in memory[1:]),
    ]


def _zero_page(kernel: BzImage, memory: Sequence[GpaRange], ramdisk: int | None, ramdisk_size: int, rsdp: int) -> bytes:
    """Return ``struct boot_params``."""
    page = bytearray(PAGE_SIZE)
    page[HEADER_START : HEADER_START + len(kernel.header)] = kernel.header
    struct.pack_into("<Q", page, _ACPI_RSDP_AT, rsdp)
    struct.pack_into("<H", page, _VIDEO_MODE_AT, _VIDEO_NORMAL)
    page[_LOADER_AT] = _UNDEFINED_LOADER
    struct.pack_into("<II", page, _RAMDISK_AT, ramdisk or 0, ramdisk_size if ramdisk is not None else 0)
    struct.pack_into("<I", page, _COMMAND_LINE_AT, _COMMAND_LINE)
    struct.pack_into("<III", page, _EXTRA_POINTERS_AT, 0, 0, 0)
    entries = _memory_map(memory)
    page[_E820_COUNT_AT] = len(entries)
    page[_E820_AT : _E820_AT + len(entries) * _E820.size] = b"".join(_E820.pack(*entry) for entry in entries)
    return bytes(page)


def _start_information(memory: Sequence[GpaRange], ramdisk: int | None, ramdisk_size: int, rsdp: int) -> bytes:
    """Return ``struct hvm_start_info`` with its module list and memory map behind it."""
    modules_at = _PARAMETERS + _PVH_START.size
    map_at = modules_at + _PVH_MODULE.size
    entries = _memory_map(memory)
    modules = 0 if ramdisk is None else 1
    return b"".join(
        (
            _PVH_START.pack(
                *(_PVH_MAGIC, _PVH_VERSION, 0, modules),
                *(modules_at if modules else 0, _COMMAND_LINE, rsdp, map_at, len(entries), 0),
            ),
            _PVH_MODULE.pack(ramdisk or 0, ramdisk_size, 0, 0),
            *(_PVH_ENTRY.pack(*entry, 0) for entry in entries),
        )
    )


def _page_tables() -> bytes:
    """Return tables that map the first 4 GiB to themselves, by pages of 2 MiB."""
    top = struct.pack("<Q", _PAGE_TABLES + PAGE_SIZE | _PRESENT_WRITABLE).ljust(PAGE_SIZE, b"\0")
    directories = _PAGE_TABLES + 2 * PAGE_SIZE
    pointers = struct.pack(
        f"<{_MAPPED_GIGABYTES}Q",
        *(directories + index * PAGE_SIZE | _PRESENT_WRITABLE for index in range(_MAPPED_GIGABYTES)),
    ).ljust(PAGE_SIZE, b"\0")
    leaves = range(0, _MAPPED_GIGABYTES * GIB, 2 * MIB)
    return top + pointers + struct.pack(f"<{len(leaves)}Q", *(leaf | _PRESENT_WRITABLE | _LARGE for leaf in leaves))
