from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmd.errors import ImageError
from kvmd.guests import GUESTS
from kvmd.payload.elf import LoadedImage, parse_elf

MIB = 1 << 20
HEADER_SIZE = 64
PROGRAM_HEADER_SIZE = 56

# Offsets of fields in the ELF header: (offset, struct format).
CLASS = (4, "<B")
DATA = (5, "<B")
IDENT_VERSION = (6, "<B")
TYPE = (16, "<H")
MACHINE = (18, "<H")
ENTRY = (24, "<Q")
PHOFF = (32, "<Q")
PHENTSIZE = (54, "<H")
PHNUM = (56, "<H")


def program_header(
    gpa: int = MIB,
    data_size: int = 16,
    memory_size: int | None = None,
    *,
    kind: int = 1,
    offset: int = 0x200,
) -> bytes:
    return struct.pack(
        "<IIQQQQQQ", kind, 7, offset, gpa, gpa, data_size, data_size if memory_size is None else memory_size, 16
    )


def elf(*program_headers: bytes, entry: int = MIB) -> bytes:
    """Return a file with these program headers and the bytes 0, 1, ... 255 at offset 0x200."""
    identity = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    count = len(program_headers)
    header = struct.pack("<16sHHIQQQIHHHHHH", identity, 2, 62, 1, entry, 64, 0, 0, 64, 56, count, 64, 0, 0)
    return (header + b"".join(program_headers)).ljust(0x200, b"\0") + bytes(range(256))


def patched(file: bytes, field: tuple[int, str], value: int) -> bytes:
    changed = bytearray(file)
    struct.pack_into(field[1], changed, field[0], value)
    return bytes(changed)


GOOD = elf(program_header())


def refusal(file: bytes) -> str:
    with pytest.raises(ImageError) as caught:
        parse_elf(file)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_segments_come_sorted_with_views_of_their_data() -> None:
    image = parse_elf(elf(program_header(2 * MIB, 4, 4096, offset=0x210), program_header(MIB, 16)))

    assert [(s.gpa, s.memory_size, bytes(s.data)) for s in image.segments] == [
        (MIB, 16, bytes(range(16))),
        (2 * MIB, 4096, bytes(range(16, 20))),
    ]
    assert (image.entry, image.start, image.end) == (MIB, MIB, 2 * MIB + 4096)


def test_the_physical_address_counts_not_the_virtual_one() -> None:
    header = struct.pack("<IIQQQQQQ", 1, 7, 0x200, 0xFFFF_8000_0010_0000, MIB, 16, 16, 16)

    assert parse_elf(elf(header)).start == MIB


def test_other_program_headers_and_empty_segments_are_passed_over() -> None:
    stack = program_header(0, 0, kind=0x6474E551)
    note = program_header(0, 16, kind=4)
    empty = program_header(0, 0)

    assert len(parse_elf(elf(stack, note, empty, program_header())).segments) == 1


def test_a_header_page_just_below_one_mebibyte_is_taken() -> None:
    image = parse_elf(elf(program_header(MIB - 4096, 16, 8192)))

    assert image.start == MIB - 4096


def test_adjacent_segments_do_not_overlap() -> None:
    assert len(parse_elf(elf(program_header(MIB, 16), program_header(MIB + 16, 16))).segments) == 2


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (b"", "not an ELF file"),
        (b"#!/bin/sh\n", "not an ELF file"),
        (b"\x7fELF", "truncated: 4 bytes"),
        (GOOD[: HEADER_SIZE - 1], "truncated: 63 bytes"),
        (patched(GOOD, CLASS, 1), r"32-bit \(ELFCLASS32\): an ELF64 is needed"),
        (patched(GOOD, CLASS, 9), "of class 9"),
        (patched(GOOD, DATA, 2), r"big-endian \(ELFDATA2MSB\)"),
        (patched(GOOD, DATA, 0), "of data encoding 0"),
        (patched(GOOD, IDENT_VERSION, 2), "ELF version 2"),
        (patched(GOOD, MACHINE, 183), "EM_AARCH64"),
        (patched(GOOD, MACHINE, 3), "EM_386: compile with -m64"),
        (patched(GOOD, MACHINE, 0xBEEF), "e_machine 48879"),
        (patched(GOOD, TYPE, 3), "ET_DYN: link with -static -no-pie"),
        (patched(GOOD, TYPE, 1), "ET_REL"),
        (patched(GOOD, TYPE, 4), "ET_CORE"),
        (patched(GOOD, TYPE, 0xBEEF), "e_type 48879"),
        (patched(GOOD, PHNUM, 0), "no program headers"),
        (patched(GOOD, PHNUM, 65), "65 program headers: at most 64"),
        (patched(GOOD, PHNUM, 0xFFFF), "65535 program headers"),
        (patched(GOOD, PHENTSIZE, 0), "0 bytes: ELF64 has 56"),
        (patched(GOOD, PHENTSIZE, 32), "32 bytes: ELF64 has 56"),
        (patched(GOOD, PHNUM, 64), "program headers end at byte 3648 of a file of 768"),
        (patched(GOOD, PHOFF, 1 << 63), "program headers end at byte"),
        (patched(GOOD, PHOFF, (1 << 64) - 1), "program headers end at byte"),
        (GOOD[: HEADER_SIZE + PROGRAM_HEADER_SIZE - 1], "program headers end at byte 120"),
        (GOOD[:0x20F], "segment 0 ends at byte 528 of a file of 527"),
        (elf(program_header(offset=(1 << 64) - 1)), "segment 0 ends at byte"),
        (elf(program_header(data_size=1 << 62)), "ends above"),
        (elf(program_header(data_size=16, memory_size=15)), "16 bytes in the file but 15 in memory"),
        (elf(program_header(MIB - 4097)), "below 1 MiB: link at 0x100000"),
        (elf(program_header(0x8000)), "at 0x8000, below 1 MiB"),
        (elf(program_header((1 << 46) - 8)), r"64 TiB"),
        (elf(program_header((1 << 64) - 8)), r"64 TiB"),
        (elf(program_header(memory_size=(1 << 64) - 1)), r"64 TiB"),
        (elf(program_header(kind=4)), "nothing to load"),
        (elf(program_header(), program_header(kind=3)), "PT_INTERP"),
        (elf(program_header(MIB, 16), program_header(MIB + 15, 16)), r"0x100010\) and \[0x10000f, .* overlap"),
        (elf(program_header(MIB, 16), program_header(MIB, 16)), "overlap"),
        (elf(program_header(), entry=MIB - 1), "entry point 0xfffff is outside every segment"),
        (elf(program_header(), entry=MIB + 16), "entry point 0x100010 is outside"),
        (elf(program_header(), entry=(1 << 64) - 1), "is outside every segment"),
    ],
)
def test_a_bad_file_is_refused_in_one_line_that_names_what_is_wrong(file: bytes, words: str) -> None:
    with pytest.raises(ImageError, match=words):
        parse_elf(file)
    refusal(file)


def check(image: LoadedImage, file: bytes) -> None:
    end = 0
    for segment in image.segments:
        assert segment.gpa >= MIB - 4096
        assert end <= segment.gpa
        assert segment.memory_size > 0
        assert len(segment.data) <= min(segment.memory_size, len(file))
        end = segment.end
    assert end <= 1 << 46
    assert any(segment.gpa <= image.entry < segment.end for segment in image.segments)


def take_whole_or_refuse(file: bytes) -> None:
    try:
        image = parse_elf(file)
    except ImageError as error:
        message = str(error)
    else:
        check(image, file)
        return
    assert "\n" not in message


@given(st.binary(max_size=300), st.booleans())
def test_arbitrary_bytes_raise_nothing_else(tail: bytes, start_well: bool) -> None:  # noqa: FBT001 - drawn
    file = GOOD[:20] + tail if start_well else tail
    take_whole_or_refuse(file)


@given(
    st.lists(
        st.tuples(
            st.integers(0, HEADER_SIZE + 2 * PROGRAM_HEADER_SIZE - 1),
            st.sampled_from([0, 1, 2, 7, 0x10, 0x7F, 0x80, 0xFF]),
        ),
        max_size=8,
    ),
    st.integers(0, 768),
)
def test_a_mutated_file_raises_nothing_else(changes: list[tuple[int, int]], missing: int) -> None:
    mutated = bytearray(elf(program_header(), program_header(2 * MIB, 32, 4096)))
    for offset, value in changes:
        mutated[offset] = value
    file = bytes(mutated[: len(mutated) - missing // 16])
    take_whole_or_refuse(file)


@given(
    st.lists(
        st.tuples(st.integers(0, 4 * MIB), st.integers(0, 512), st.integers(0, 2 * MIB), st.integers(0, 768)),
        min_size=1,
        max_size=5,
    ),
    st.integers(0, 5 * MIB),
)
def test_arbitrary_segments_are_taken_whole_or_refused(drawn: list[tuple[int, int, int, int]], entry: int) -> None:
    file = elf(*(program_header(gpa, size, more, offset=offset) for gpa, size, more, offset in drawn), entry=entry)
    take_whole_or_refuse(file)


@pytest.mark.parametrize("name", GUESTS)
def test_our_guests_are_taken(name: str) -> None:
    file = GUESTS[name].path.read_bytes()
    image = parse_elf(file)

    check(image, file)
    assert image.entry == MIB
