from __future__ import annotations

import ctypes

from hypothesis import given
from hypothesis import strategies as st

from kvmd.kvm.cpuid import (
    CpuidEntry,
    empty_table,
    physical_address_bits,
    read_table,
    supports_gigabyte_pages,
    with_apic_id,
    write_table,
)

U32 = st.integers(0, 2**32 - 1)
ENTRIES = st.lists(st.builds(CpuidEntry, U32, U32, U32, U32, U32, U32, U32), max_size=20)


def leaf(function: int, *, eax: int = 0, ebx: int = 0, edx: int = 0, index: int = 0) -> CpuidEntry:
    return CpuidEntry(function, index, 0, eax, ebx, 0, edx)


@given(ENTRIES)
def test_a_table_reads_back_as_written(entries: list[CpuidEntry]) -> None:
    table = write_table(entries)
    assert read_table(table) == tuple(entries)
    assert ctypes.sizeof(table) == 8 + 40 * len(entries)


def test_an_empty_table_tells_its_capacity() -> None:
    assert len(read_table(empty_table(3))) == 3


def test_the_apic_id_is_the_vcpu_s() -> None:
    entries = [
        leaf(0x1, ebx=0x7702_0800),
        leaf(0xB, edx=9),
        leaf(0xB, edx=9, index=1),
        leaf(0x1F, edx=9),
        leaf(0x4, ebx=0xFFFF_FFFF, edx=9),
    ]
    first, topology, subleaf, newer, other = with_apic_id(entries, 3)
    assert first.ebx == 0x0302_0800
    assert (topology.edx, subleaf.edx, newer.edx) == (3, 3, 3)
    assert other == entries[4]


def test_leaf_1_holds_eight_bits_of_a_large_apic_id() -> None:
    first, topology = with_apic_id([leaf(0x1), leaf(0xB)], 0x1_02)
    assert first.ebx == 0x0200_0000
    assert topology.edx == 0x102


def test_address_bits() -> None:
    assert physical_address_bits([leaf(0x8000_0008, eax=0x3034)]) == 0x34
    assert physical_address_bits([leaf(0x1)]) == 36


def test_gigabyte_pages() -> None:
    assert supports_gigabyte_pages([leaf(0x1), leaf(0x8000_0001, edx=1 << 26)])
    assert not supports_gigabyte_pages([leaf(0x8000_0001, edx=~(1 << 26) & 0xFFFF_FFFF)])
    assert not supports_gigabyte_pages([leaf(0x1, edx=1 << 26)])
