"""CPUID leaves: what the host's KVM can offer, made to fit one vCPU."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from kvmd.kvm.uapi import Cpuid2, CpuidEntry2

_FEATURES = 0x1
_TOPOLOGY_LEAVES = (0xB, 0x1F)
_EXTENDED_FEATURES = 0x8000_0001
_ADDRESS_SIZES = 0x8000_0008

_APIC_ID_SHIFT = 24
_APIC_ID_MASK = 0xFF << _APIC_ID_SHIFT
_GIGABYTE_PAGES = 1 << 26
_ADDRESS_BITS_MASK = 0xFF
_DEFAULT_ADDRESS_BITS = 36
"""Physical address bits of a processor without leaf 0x80000008 (Intel SDM volume 3A, 4.1.4)."""


@dataclass(frozen=True, slots=True)
class CpuidEntry:
    """One ``struct kvm_cpuid_entry2``: leaf ``function``, subleaf ``index`` and the four registers."""

    function: int
    index: int
    flags: int
    eax: int
    ebx: int
    ecx: int
    edx: int


def with_apic_id(entries: Iterable[CpuidEntry], apic_id: int) -> tuple[CpuidEntry, ...]:
    """Return ``entries`` with the fields that tell a vCPU which one it is.

    These are the initial APIC id of leaf 1 and the x2APIC id of the topology leaves 0xB and 0x1F (Intel SDM
    volume 2A, CPUID); KVM reports those of whichever host processor was asked.
    """
    return tuple(_own(entry, apic_id) for entry in entries)


def _own(entry: CpuidEntry, apic_id: int) -> CpuidEntry:
    if entry.function == _FEATURES:
        # Eight bits: software with more processors reads the topology leaves.
        own = apic_id << _APIC_ID_SHIFT & _APIC_ID_MASK
        return replace(entry, ebx=entry.ebx & ~_APIC_ID_MASK | own)
    if entry.function in _TOPOLOGY_LEAVES:
        return replace(entry, edx=apic_id)
    return entry


def physical_address_bits(entries: Iterable[CpuidEntry]) -> int:
    """Return MAXPHYADDR, the width of a guest-physical address in bits."""
    for entry in entries:
        if entry.function == _ADDRESS_SIZES:
            return entry.eax & _ADDRESS_BITS_MASK
    return _DEFAULT_ADDRESS_BITS


def supports_gigabyte_pages(entries: Iterable[CpuidEntry]) -> bool:
    """Tell whether page tables may map 1 GiB by one entry of a page-directory-pointer table."""
    return any(entry.function == _EXTENDED_FEATURES and entry.edx & _GIGABYTE_PAGES for entry in entries)


def empty_table(capacity: int) -> ctypes.Array[ctypes.c_char]:
    """Return a ``struct kvm_cpuid2`` with room for ``capacity`` entries, for the kernel to fill."""
    table = ctypes.create_string_buffer(ctypes.sizeof(Cpuid2) + capacity * ctypes.sizeof(CpuidEntry2))
    Cpuid2.from_buffer(table).nent = capacity
    return table


def read_table(table: ctypes.Array[ctypes.c_char]) -> tuple[CpuidEntry, ...]:
    """Return the entries of a ``struct kvm_cpuid2`` that the kernel filled."""
    raw = (CpuidEntry2 * Cpuid2.from_buffer(table).nent).from_buffer(table, ctypes.sizeof(Cpuid2))
    return tuple(CpuidEntry(e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx) for e in raw)


def write_table(entries: Sequence[CpuidEntry]) -> ctypes.Array[ctypes.c_char]:
    """Return ``entries`` as a ``struct kvm_cpuid2`` for the kernel to read."""
    table = empty_table(len(entries))
    raw = (CpuidEntry2 * len(entries)).from_buffer(table, ctypes.sizeof(Cpuid2))
    for i, e in enumerate(entries):
        raw[i] = CpuidEntry2(e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx)
    return table
