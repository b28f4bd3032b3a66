from __future__ import annotations

import itertools
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmd.errors import ConfigError, ImageError
from kvmd.payload.boot import BOOT_MAGIC, SHARED_OFFSET, STACK_SIZE, BootLayout, plan_boot
from kvmd.payload.elf import LoadedImage, Segment

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40
PAGE = 4096
C_BIT = 45


def image(size_bytes: int = 10_000, gpa: int = MIB) -> LoadedImage:
    return LoadedImage(gpa, (Segment(gpa, size_bytes, memoryview(b"\x90\xf4")),))


def layout(
    memory_size: int = 64 * MIB,
    *,
    vcpus: int = 2,
    c_bit: int | None = C_BIT,
    gigabyte_pages: bool = False,
    loaded: LoadedImage | None = None,
    arguments: tuple[int, ...] = (),
) -> BootLayout:
    return plan_boot(
        loaded or image(),
        memory_size=memory_size,
        vcpus=vcpus,
        c_bit=c_bit,
        gigabyte_pages=gigabyte_pages,
        arguments=arguments,
    )


class Walker:
    """Translates addresses as AMD64 APM volume 2, 5.3 says, on the private memory that a layout writes.

    Every table must be in private memory: its address carries the C-bit, which the walker takes off.
    """

    def __init__(self, boot: BootLayout) -> None:
        self._boot = boot
        self._c_bit = 0 if boot.c_bit is None else 1 << boot.c_bit

    def _entry(self, table: int, index: int) -> int | None:
        assert table & self._c_bit == self._c_bit
        gpa = (table & ~self._c_bit) + index * 8
        for write in self._boot.writes:
            if write.gpa <= gpa < write.gpa + len(write.data):
                (entry,) = struct.unpack_from("<Q", write.data, gpa - write.gpa)
                if not entry & 1:
                    assert entry == 0
                    return None
                assert entry & 0x7F == 0x7  # present, writable, user; nothing else
                return int(entry)
        raise AssertionError(f"no table at {gpa:#x}")

    def translate(self, address: int) -> int | None:
        """Return the physical address, C-bit included, or None for a page fault."""
        table = self._boot.cr3
        for shift in (39, 30, 21):
            entry = self._entry(table, address >> shift & 0x1FF)
            if entry is None:
                return None
            if entry & 0x80:
                assert shift < 39
                offset_mask = (1 << shift) - 1
                frame = entry & ~0xFFF
                assert frame & offset_mask == 0
                return frame | (address & offset_mask)
            table = entry & ~0xFFF
        raise AssertionError("no leaf above 4 KiB pages")


def interesting_addresses(memory_size: int) -> list[int]:
    edges = [0, PAGE, 2 * MIB, GIB, 4 * GIB - 1, memory_size // 2 + 12345, memory_size - 1, memory_size]
    return edges + ([512 * GIB - 1, 512 * GIB] if memory_size > 512 * GIB else [])


@pytest.mark.parametrize("gigabyte_pages", [False, True])
@pytest.mark.parametrize("memory_size", [2 * MIB, 64 * MIB, 3 * GIB, 4 * GIB, 5 * GIB + PAGE, 700 * GIB])
def test_both_views_translate_to_their_side(memory_size: int, gigabyte_pages: bool) -> None:  # noqa: FBT001 - a case
    walker = Walker(layout(memory_size, gigabyte_pages=gigabyte_pages))

    for address in interesting_addresses(memory_size):
        assert walker.translate(address) == address | 1 << C_BIT
        assert walker.translate(SHARED_OFFSET + address) == address


@pytest.mark.parametrize("gigabyte_pages", [False, True])
def test_what_is_not_mapped_faults(gigabyte_pages: bool) -> None:  # noqa: FBT001 - a case - a parameter of the test
    walker = Walker(layout(gigabyte_pages=gigabyte_pages))

    for address in (4 * GIB, 512 * GIB, SHARED_OFFSET - 1, SHARED_OFFSET + 4 * GIB, (1 << 47) - PAGE):
        assert walker.translate(address) is None


def test_a_machine_with_one_view_maps_only_that() -> None:
    boot = layout(c_bit=None)
    walker = Walker(boot)

    assert boot.shared_offset == 0
    assert boot.cr3 == boot.system.start
    assert walker.translate(0x1234567) == 0x1234567
    assert walker.translate(SHARED_OFFSET) is None


@given(
    memory_pages=st.integers(1, 6 * GIB // PAGE),
    image_size=st.integers(1, 8 * MIB),
    image_page=st.integers(255, 4096),
    vcpus=st.integers(1, 70),
    c_bit=st.sampled_from([None, 36, 39, 45, 51]),
    gigabyte_pages=st.booleans(),
)
def test_areas_are_apart_and_within_memory_or_the_least_size_fits(
    *, memory_pages: int, image_size: int, image_page: int, vcpus: int, c_bit: int | None, gigabyte_pages: bool
) -> None:
    memory_size = memory_pages * PAGE
    loaded = image(image_size, image_page * PAGE)
    try:
        boot = layout(memory_size, vcpus=vcpus, c_bit=c_bit, gigabyte_pages=gigabyte_pages, loaded=loaded)
    except ImageError as error:
        least = int(str(error).split("at least ")[1].split(" ")[0])
        assert least > memory_size
        layout(least, vcpus=vcpus, c_bit=c_bit, gigabyte_pages=gigabyte_pages, loaded=loaded)
        with pytest.raises(ImageError):
            layout(least - PAGE, vcpus=vcpus, c_bit=c_bit, gigabyte_pages=gigabyte_pages, loaded=loaded)
        return
    assert boot.first_free % PAGE == 0
    assert boot.first_free <= memory_size
    areas = sorted(
        [
            (loaded.start, loaded.end),
            (boot.cr3 & ~(1 << (c_bit or 63)), boot.boot_information),
            (boot.boot_information, boot.boot_information + PAGE),
            *((stack.start, stack.end) for stack in boot.stacks),
        ]
    )
    assert areas[0][0] >= PAGE
    assert all(lower[1] <= upper[0] for lower, upper in itertools.pairwise(areas))
    assert areas[-1][1] <= boot.first_free
    assert boot.pinned.end == boot.first_free
    assert (boot.free is None) == (boot.first_free == memory_size)


def test_the_boot_information_says_what_the_abi_says() -> None:
    boot = layout(64 * MIB, vcpus=3, arguments=(7, (1 << 64) - 1))
    written = next(write for write in boot.writes if write.gpa == boot.boot_information)

    assert bytes(written.data[:8]) == b"KVINFO01"
    assert struct.unpack("<QIIQQQII8Q", written.data) == (
        BOOT_MAGIC,
        1,
        3,
        64 * MIB,
        1 << 46,
        2 * MIB,
        C_BIT,
        1,
        7,
        (1 << 64) - 1,
        *(0,) * 6,
    )


def test_a_machine_with_one_view_is_told_so() -> None:
    boot = layout(c_bit=None)
    written = next(write for write in boot.writes if write.gpa == boot.boot_information)

    assert struct.unpack_from("<Q", written.data, 24) == (0,)
    assert struct.unpack_from("<I", written.data, 40) == (0,)


def test_every_vcpu_starts_at_the_entry_on_its_own_stack() -> None:
    boot = layout(vcpus=4)

    assert [registers.rdi for registers in boot.registers] == [0, 1, 2, 3]
    assert [registers.rsp for registers in boot.registers] == [stack.end for stack in boot.stacks]
    for registers, stack in zip(boot.registers, boot.stacks, strict=True):
        assert (registers.rip, registers.rsi) == (MIB, boot.boot_information)
        assert registers.rsp % 16 == 0
        assert registers.rflags == 0x3002
        assert stack.size_bytes == STACK_SIZE == 16 * KIB
    assert boot.cpl == 3


def test_the_system_area_follows_the_image() -> None:
    assert layout().system.start == MIB + 12 * KIB


def test_the_system_area_goes_below_the_image_where_it_does_not_fit_behind() -> None:
    boot = layout(MIB + 12 * KIB)

    assert boot.system.start == PAGE
    assert boot.first_free == MIB + 12 * KIB
    assert boot.free is None


def test_too_little_memory_is_refused_with_the_least_size() -> None:
    with pytest.raises(ImageError, match=r"2097152 bytes of memory .* 2 vCPUs: at least 5\d{6} \(5 MiB\)"):
        layout(2 * MIB, loaded=image(4 * MIB, gpa=MIB - PAGE))


def test_the_first_free_byte_is_rounded_only_where_there_is_memory_for_it() -> None:
    assert layout(16 * MIB).first_free == 2 * MIB
    assert layout(16 * MIB - PAGE).first_free < 2 * MIB
    boot = layout(17 * MIB, loaded=image(15 * MIB + 512 * KIB))
    assert boot.first_free == boot.system.end


@pytest.mark.parametrize(
    ("memory_size", "c_bit", "words"),
    [
        (0, C_BIT, "positive multiple of 4096"),
        (-PAGE, C_BIT, "positive multiple"),
        (64 * MIB + 1, C_BIT, "positive multiple"),
        (64 * TIB, C_BIT, "at most 32 TiB, address bit 45 is the C-bit"),
        (64 * TIB + PAGE, 51, "at most 64 TiB, the shared view starts there"),
        (64 * TIB + PAGE, None, "at most 64 TiB"),
        (64 * MIB, 31, "C-bit 31"),
        (64 * MIB, 52, "C-bit 52"),
    ],
)
def test_memory_that_cannot_be_meant_is_refused(memory_size: int, c_bit: int | None, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        layout(memory_size, c_bit=c_bit)


@pytest.mark.parametrize("c_bit", [C_BIT, 46, 51, None])
def test_memory_up_to_the_limit_is_mapped(c_bit: int | None) -> None:
    limit = 1 << min(46, c_bit or 46)
    walker = Walker(layout(limit, c_bit=c_bit, gigabyte_pages=True))

    assert walker.translate(limit - 1) == (limit - 1) | (0 if c_bit is None else 1 << c_bit)
    if c_bit is not None:
        assert walker.translate(SHARED_OFFSET + limit - 1) == limit - 1


def test_numbers_for_the_guest_are_bounded() -> None:
    with pytest.raises(ConfigError, match="9 arguments"):
        layout(arguments=(0,) * 9)
    with pytest.raises(ConfigError, match="argument -1"):
        layout(arguments=(-1,))
    with pytest.raises(ConfigError, match=f"argument {1 << 64}"):
        layout(arguments=(1 << 64,))
    with pytest.raises(ConfigError, match="0 vCPUs"):
        layout(vcpus=0)
