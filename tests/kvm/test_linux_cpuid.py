"""The processor of a Linux guest, field by field as the manuals have them."""

from __future__ import annotations

import pytest

from kvmd.kvm.cpuid import CpuidEntry
from kvmd.kvm.linux_cpuid import id_bits, linux_cpuid

ALL = 0xFFFF_FFFF


def entry(function: int, index: int = 0, eax: int = 0, ebx: int = 0, ecx: int = 0, edx: int = 0) -> CpuidEntry:
    return CpuidEntry(function, index, 0, eax, ebx, ecx, edx)


def made(
    *entries: CpuidEntry, index: int = 0, vcpus: int = 1, tsc_deadline: bool = True
) -> dict[tuple[int, int], CpuidEntry]:
    table = linux_cpuid(entries, index=index, vcpus=vcpus, tsc_deadline=tsc_deadline)
    found = {(e.function, e.index): e for e in table}
    assert len(found) == len(table)
    return found


@pytest.mark.parametrize(("vcpus", "bits"), [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (256, 8)])
def test_the_bits_that_tell_cores_apart(vcpus: int, bits: int) -> None:
    assert id_bits(vcpus) == bits


def test_each_processor_knows_its_own_number_everywhere() -> None:
    table = made(entry(1), entry(0x8000_001E, eax=9, ebx=0x109), index=3, vcpus=6)
    assert table[1, 0].ebx >> 24 == 3
    assert table[0x8000_001E, 0].eax == 3
    assert table[0x8000_001E, 0].ebx == 3  # one thread a core
    assert [table[0xB, level].edx for level in (0, 1, 2)] == [3, 3, 3]


def test_one_socket_of_as_many_cores_as_vcpus() -> None:
    table = made(entry(1, edx=ALL), entry(0x8000_0008, eax=40, ecx=0x7F00), entry(0x8000_0001, ecx=ALL), vcpus=6)
    assert table[1, 0].ebx >> 16 & 0xFF == 8
    assert table[1, 0].edx >> 28 & 1
    assert table[0x8000_0008, 0] == entry(0x8000_0008, eax=40, ecx=3 << 12 | 5)
    threads, cores, end = (table[0xB, level] for level in (0, 1, 2))
    assert (threads.eax, threads.ebx, threads.ecx) == (0, 1, 1 << 8)
    assert (cores.eax, cores.ebx, cores.ecx) == (3, 6, 2 << 8 | 1)
    assert (end.eax, end.ebx, end.ecx) == (0, 0, 2)


def test_a_single_processor_claims_no_siblings() -> None:
    table = made(entry(1, edx=ALL), entry(0x8000_0001, ecx=ALL))
    assert not table[1, 0].edx >> 28 & 1
    assert not table[0x8000_0001, 0].ecx >> 1 & 1


def test_caches_of_the_third_level_are_everybody_s() -> None:
    l2, l3 = 2 << 5 | 3, 3 << 5 | 3
    table = made(
        entry(4, 2, eax=l2 | 0xFFFF_C000), entry(4, 3, eax=l3 | 0xFFFF_C000), entry(0x8000_001D, 3, eax=l3), vcpus=4
    )
    assert table[4, 2].eax == 3 << 26 | l2
    assert table[4, 3].eax == 3 << 26 | 3 << 14 | l3
    assert table[0x8000_001D, 3].eax == 3 << 14 | l3


def test_what_does_not_work_is_left_out() -> None:
    leaves = (0x5, 0xA, 0x12, 0x14, 0x8000_000A, 0x8000_001F, 0x8000_0022)
    table = made(entry(1, ecx=ALL), entry(0x8000_0001, ecx=ALL), *(entry(leaf, eax=ALL) for leaf in leaves))
    assert not {function for function, _ in table} & set(leaves)
    assert not table[1, 0].ecx & (1 << 3 | 1 << 5)  # MONITOR, VMX
    assert not table[0x8000_0001, 0].ecx & 1 << 2  # SVM


def test_features_whose_leaves_are_left_out_are_not_claimed() -> None:
    table = made(entry(7, ebx=ALL, ecx=ALL, edx=ALL), entry(7, 1, eax=ALL, ebx=ALL, ecx=ALL, edx=ALL))
    assert table[7, 0].ebx == ALL & ~(1 << 2 | 1 << 25)  # SGX, processor trace
    assert table[7, 0].ecx == ALL & ~(1 << 30)  # SGX_LC
    assert table[7, 0].edx == ALL
    assert table[7, 1] == entry(7, 1, eax=ALL, ebx=ALL, ecx=ALL, edx=ALL)


def test_the_local_apic_s_modes_are_those_that_kvm_has() -> None:
    with_deadline, without = made(entry(1)), made(entry(1, ecx=ALL), tsc_deadline=False)
    assert with_deadline[1, 0].ecx >> 24 & 1
    assert not without[1, 0].ecx >> 24 & 1
    for table in (with_deadline, without):
        assert table[1, 0].ecx >> 21 & 1  # x2APIC
        assert table[1, 0].ecx >> 31 & 1  # a hypervisor


def test_kvm_s_features_are_those_that_need_nothing_of_us() -> None:
    table = made(entry(0x4000_0001, eax=ALL), entry(0x4000_0000, ebx=0x4B4D564B))
    assert table[0x4000_0001, 0].eax == 0x0100_3AEB
    assert table[0x4000_0000, 0].ebx == 0x4B4D564B
