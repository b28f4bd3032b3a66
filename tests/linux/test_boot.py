"""Where a Linux guest's parts lie, and what its kernel reads of it."""

from __future__ import annotations

import itertools
import struct

import pytest

from kvmd.errors import ConfigError, ImageError
from kvmd.linux.address_map import DEVICES_START, HIGH_MEMORY_START, LOCAL_APIC, LOW_MEMORY_END, memory_ranges
from kvmd.linux.boot import LinuxBoot, LinuxWrite, plan_linux
from kvmd.linux.kernel import parse_kernel
from kvmd.ranges import GpaRange
from kvmd.units import GIB
from tests.linux import kernels
from tests.linux.kernels import MIB, bzimage, vmlinux

ACPI = LinuxWrite(0xE_0000, b"RSD PTR ")


def planned(file: bytes | None = None, memory: int = 256 * MIB, initrd: bytes = b"", line: str = "quiet") -> LinuxBoot:
    return plan_linux(
        parse_kernel(bzimage() if file is None else file),
        memory_size=memory,
        initrd=initrd,
        command_line=line,
        acpi=ACPI,
    )


def image_of(boot: LinuxBoot) -> dict[int, bytes]:
    writes = sorted((write.gpa, bytes(write.data)) for write in boot.writes)
    for (gpa, data), (following, _) in itertools.pairwise(writes):
        assert gpa + len(data) <= following, "two writes overlap"
    return dict(writes)


def text_at(image: dict[int, bytes], gpa: int) -> bytes:
    return image[gpa].partition(b"\0")[0]


def test_memory_leaves_room_for_the_devices() -> None:
    assert memory_ranges(LOW_MEMORY_END) == (GpaRange(0, 3 * GIB),)
    assert memory_ranges(5 * GIB) == (GpaRange(0, 3 * GIB), GpaRange(4 * GIB, 6 * GIB))
    assert LOW_MEMORY_END <= DEVICES_START < LOCAL_APIC < HIGH_MEMORY_START


def test_the_64_bit_protocol() -> None:
    initrd = b"initrd" * 1000
    boot = planned(memory=5 * GIB, initrd=initrd)
    image = image_of(boot)
    assert (boot.protocol, boot.mode) == ("64-bit", "long")
    assert boot.registers.rip == 16 * MIB + 0x200
    assert image[16 * MIB] == kernels.PAYLOAD

    page = image[boot.registers.rsi]
    assert page[0x1FC:0x210] == bzimage()[0x1FC:0x210]
    assert page[0x210] == 0xFF  # the loader's type
    rsdp, line, ramdisk, size = (
        *struct.unpack_from("<Q", page, 0x70),
        *struct.unpack_from("<I", page, 0x228),
        *struct.unpack_from("<II", page, 0x218),
    )
    assert rsdp == ACPI.gpa
    assert text_at(image, line) == b"quiet"
    assert image[ramdisk] == initrd
    assert size == len(initrd)
    assert ramdisk % 4096 == 0
    assert ramdisk + size <= 1 << 31  # where this kernel's header ends it
    entries = [struct.unpack_from("<QQI", page, 0x2D0 + index * 20) for index in range(page[0x1E8])]
    assert entries == [
        (0, 0xA_0000, 1),
        (0xE_0000, 0x1_F000, 3),
        (MIB, 3 * GIB - MIB, 1),
        (4 * GIB, 2 * GIB, 1),
    ]

    gdt = struct.unpack("<4Q", image[boot.gdt[0]])
    assert boot.gdt[1] == 32
    assert gdt[2] >> 53 & 1, "the code segment is for 64 bits"
    tables = image[boot.cr3]
    for gpa in (0, 16 * MIB, 4 * GIB - 2 * MIB):
        assert walked(tables, boot.cr3, gpa) == gpa


def walked(tables: bytes, cr3: int, address: int) -> int:
    table = cr3
    for shift in (39, 30, 21):
        (entry,) = struct.unpack_from("<Q", tables, table - cr3 + (address >> shift & 0x1FF) * 8)
        assert entry & 0x3 == 0x3
        table = entry & ~0xFFF
    assert entry & 0x80
    return int(entry) & ~0x1F_FFFF | address & 0x1F_FFFF


def test_pvh() -> None:
    boot = planned(vmlinux(), initrd=b"initrd")
    image = image_of(boot)
    assert (boot.protocol, boot.mode, boot.cr3) == ("pvh", "protected", 0)
    assert boot.registers.rip == 16 * MIB + 0x40
    assert image[16 * MIB] == bytes(range(256))
    start = image[boot.registers.rbx]
    magic, version, flags, modules, list_at, line, rsdp, map_at, count, _ = struct.unpack_from("<IIIIQQQQII", start)
    assert (magic, version, flags, modules, rsdp) == (0x336E_C578, 1, 0, 1, ACPI.gpa)
    assert text_at(image, line) == b"quiet"
    gpa, size, _, _ = struct.unpack_from("<4Q", start, list_at - boot.registers.rbx)
    assert (image[gpa], size) == (b"initrd", 6)
    memory = [struct.unpack_from("<QQII", start, map_at - boot.registers.rbx + i * 24) for i in range(count)]
    assert [(at, length, kind) for at, length, kind, _ in memory] == [
        (0, 0xA_0000, 1),
        (0xE_0000, 0x1_F000, 3),
        (MIB, 255 * MIB, 1),
    ]


@pytest.mark.parametrize("relocatable", [0, 1])
def test_a_kernel_that_does_not_fit_where_it_wants_to_be_is_refused(relocatable: int) -> None:
    # Put below, a relocatable one moves up to there all the same, and finds no memory (boot.rst, "init_size").
    file = bzimage({kernels.RELOCATABLE: relocatable})
    assert planned(file, memory=24 * MIB).registers.rip == 16 * MIB + 0x200
    with pytest.raises(ImageError, match="the memory is too small for this kernel: it needs 24 MiB"):
        planned(file, memory=24 * MIB - 4096)


@pytest.mark.parametrize(("preferred", "start"), [(0, 2 * MIB), (3 * MIB, 4 * MIB), (16 * MIB + 4096, 18 * MIB)])
def test_a_kernel_that_may_lie_elsewhere_lies_where_its_alignment_lets_it(preferred: int, start: int) -> None:
    assert planned(bzimage({kernels.PREFERRED: preferred})).registers.rip == start + 0x200


def test_a_kernel_that_wants_more_than_any_machine_has_is_refused() -> None:
    with pytest.raises(ImageError, match=r"below the devices"):
        planned(bzimage({kernels.RELOCATABLE: 0, kernels.PREFERRED: 1 << 62}))


@pytest.mark.parametrize(("file", "size"), [(bzimage(), 240 * MIB), (vmlinux(), 250 * MIB)])
def test_an_initrd_that_does_not_fit_is_refused_with_what_would_do(file: bytes, size: int) -> None:
    with pytest.raises(ImageError, match=r"the initrd of .* does not fit beside the kernel: give at least \d+ MiB"):
        planned(file, initrd=bytes(size))


@pytest.mark.parametrize("memory", [60 * MIB, 256 * MIB, 4 * GIB])
def test_an_initrd_that_no_memory_makes_fit_is_refused_with_the_reason(memory: int) -> None:
    file = bzimage({kernels.INITRD_LIMIT: 64 * MIB - 1})
    with pytest.raises(ImageError, match=r"the initrd of 50 MiB does not fit below 0x4000000, where this kernel"):
        planned(file, memory=memory, initrd=bytes(50 * MIB))


def test_an_initrd_may_lie_below_a_kernel_that_is_high() -> None:
    boot = planned(bzimage({kernels.PREFERRED: 200 * MIB, kernels.MEMORY_SIZE: 56 * MIB}), initrd=b"x")
    assert image_of(boot)[200 * MIB - 4096] == b"x"


def test_too_little_memory_is_said_before_anything_else() -> None:
    with pytest.raises(ImageError, match=r"8 MiB of memory are too few for Linux: give at least 16M"):
        planned(memory=8 * MIB)


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("x" * 2048, "2048 characters are too many: this kernel takes at most 2047"),
        ("a\nb", "one line"),
        ("a\0b", "one line"),
        ("gr\xfc\xdfe", "no ASCII"),
    ],
)
def test_a_command_line_that_the_kernel_cannot_take_is_refused(line: str, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        planned(line=line)
