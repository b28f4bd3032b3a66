"""What CPUID tells a guest on the software CPU: the emulator's processor, and which vCPU it is.

Unicorn's own answers do not tell vCPUs apart. So its processor is asked once, leaf by leaf, and the hook of CPUID
answers from that.
"""

from __future__ import annotations

from functools import cache

from unicorn import unicorn_const as uc
from unicorn import x86_const as x86
from unicorn.unicorn_py3 import Uc

from kvmd.units import PAGE_SIZE

Answer = tuple[int, int, int, int]
"""EAX, EBX, ECX and EDX."""

_BASIC, _EXTENDED = 0, 0x8000_0000
_FEATURES, _EXTENDED_FEATURES, _ADDRESS_SIZES = 0x1, 0x8000_0001, 0x8000_0008
_TOPOLOGY_LEAVES = (0xB, 0x1F)
_SUBLEAVES = 8
"""Asked of each leaf; those that have more do not exist here."""

_APIC_ID_SHIFT = 24
_APIC_ID_MASK = 0xFF << _APIC_ID_SHIFT
_MOST_LEAVES = 64
_GIGABYTE_PAGES = 1 << 26
_HYPERVISOR = 1 << 31
_NOT_HERE_1_ECX = 1 << 3 | 1 << 26 | 1 << 27 | 1 << 28 | 1 << 29 | 1 << 12
"""MONITOR, XSAVE, OSXSAVE, AVX, F16C and FMA: the emulator would not have them, or has them wrong."""
_NOT_HERE_7_EBX = 1 << 0 | 1 << 5 | 1 << 19 | 1 << 23 | 1 << 24 | 0xFFFF << 16 & ~(1 << 18 | 1 << 20)
"""FSGSBASE (CR4 forbids it), AVX2, ADX, CLFLUSHOPT, CLWB, and what AVX-512 has there."""
_PHYSICAL_BITS = 48
_VIRTUAL_BITS = 48

_CODE = 0x1000
_CPUID = b"\x0f\xa2"


def cpuid(index: int, leaf: int, subleaf: int) -> Answer:
    """Return what CPUID answers on the vCPU of a number."""
    table = _table()
    last = table[leaf & _EXTENDED, 0][0] if (leaf & _EXTENDED, 0) in table else 0
    if not leaf & _EXTENDED <= leaf <= max(last, leaf & _EXTENDED):
        return (0, 0, 0, 0)
    eax, ebx, ecx, edx = table.get((leaf, min(subleaf, _SUBLEAVES - 1)), (0, 0, 0, 0))
    if leaf == _FEATURES:
        ebx = ebx & ~_APIC_ID_MASK | index << _APIC_ID_SHIFT & _APIC_ID_MASK
        ecx = (ecx & ~_NOT_HERE_1_ECX) | _HYPERVISOR
    elif leaf in _TOPOLOGY_LEAVES:
        edx = index
    elif leaf == 7 and subleaf == 0:  # noqa: PLR2004 - structured extended features
        ebx &= ~_NOT_HERE_7_EBX
    elif leaf == _EXTENDED_FEATURES:
        edx |= _GIGABYTE_PAGES
    elif leaf == _ADDRESS_SIZES:
        eax = eax & ~0xFFFF | _VIRTUAL_BITS << 8 | _PHYSICAL_BITS
    return eax, ebx, ecx, edx


@cache
def _table() -> dict[tuple[int, int], Answer]:
    """Return what the emulator's own processor answers, by leaf and subleaf."""
    emulator = Uc(uc.UC_ARCH_X86, uc.UC_MODE_64)
    emulator.mem_map(_CODE, PAGE_SIZE)
    emulator.mem_write(_CODE, _CPUID)
    answers: dict[tuple[int, int], Answer] = {}
    for first in (_BASIC, _EXTENDED):
        last = _ask(emulator, first, 0)[0]
        for leaf in range(first, min(last, first + _MOST_LEAVES) + 1):
            for subleaf in range(_SUBLEAVES):
                answers[leaf, subleaf] = _ask(emulator, leaf, subleaf)
    return answers


def _ask(emulator: Uc, leaf: int, subleaf: int) -> Answer:
    emulator.reg_write(x86.UC_X86_REG_RAX, leaf)
    emulator.reg_write(x86.UC_X86_REG_RCX, subleaf)
    emulator.emu_start(_CODE, _CODE + len(_CPUID))
    names = (x86.UC_X86_REG_EAX, x86.UC_X86_REG_EBX, x86.UC_X86_REG_ECX, x86.UC_X86_REG_EDX)
    eax, ebx, ecx, edx = (int(value) for value in emulator.reg_read_batch(names))
    return eax, ebx, ecx, edx
