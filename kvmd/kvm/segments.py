"""The special registers of a vCPU as it starts: in 64-bit mode, or in flat 32-bit protected mode."""

from __future__ import annotations

from typing import Final

from kvmd.kvm.uapi import Dtable, Segment, Sregs

# AMD64 APM volume 2, 3.1 (control registers and EFER) and 4.8 (long-mode descriptors).
_CR0_PE: Final = 1 << 0
_CR0_MP: Final = 1 << 1
_CR0_ET: Final = 1 << 4
_CR0_NE: Final = 1 << 5
_CR0_WP: Final = 1 << 16
_CR0_AM: Final = 1 << 18
_CR0_PG: Final = 1 << 31
_CR4_PAE: Final = 1 << 5
_CR4_OSFXSR: Final = 1 << 9
_CR4_OSXMMEXCPT: Final = 1 << 10
_EFER_SCE: Final = 1 << 0
_EFER_LME: Final = 1 << 8
_EFER_LMA: Final = 1 << 10
_EFER_NXE: Final = 1 << 11

_TYPE_CODE: Final = 0xB  # execute, read, accessed
_TYPE_DATA: Final = 0x3  # read, write, accessed

_TYPE_BUSY_TSS: Final = 0xB

_KERNEL: Final = 0
_USER: Final = 3
# Linux's numbering (asm/segment.h), so that a dump of registers reads as one expects; RPL as the CPL.
_SELECTORS: Final = {_KERNEL: (0x10, 0x18), _USER: (0x33, 0x2B)}


def enter_long_mode(sregs: Sregs, *, cr3: int, cpl: int, gdt: tuple[int, int] | None = None) -> None:
    """Change ``sregs``, as KVM_GET_SREGS gave them, to 64-bit mode with flat segments.

    The IDT is empty, so any exception in the guest is a triple fault. TR, LDTR and the APIC's base stay as they were
    after reset.

    Args:
        sregs: changed in place.
        cr3: guest-physical address of the page tables' root, C-bit included.
        cpl: privilege level, 0 or 3.
        gdt: address and size in bytes of a table in guest memory that the selectors fit; none by default.

    Raises:
        ValueError: ``cpl`` is another.
    """
    if cpl not in _SELECTORS:
        raise ValueError(f"a guest starts at privilege level 0 or 3, not {cpl}")
    code, data = _SELECTORS[cpl]
    flat = {"limit": 0xFFFF_FFFF, "present": 1, "dpl": cpl, "s": 1, "g": 1}
    sregs.cs = Segment(selector=code, type=_TYPE_CODE, l=1, **flat)
    for name in ("ds", "es", "fs", "gs", "ss"):
        setattr(sregs, name, Segment(selector=data, type=_TYPE_DATA, db=1, **flat))
    sregs.gdt = _table(gdt)
    sregs.idt = Dtable()
    sregs.cr0 = _CR0_PG | _CR0_AM | _CR0_WP | _CR0_NE | _CR0_ET | _CR0_MP | _CR0_PE
    sregs.cr3 = cr3
    sregs.cr4 = _CR4_PAE | _CR4_OSFXSR | _CR4_OSXMMEXCPT
    sregs.efer = _EFER_LME | _EFER_LMA | _EFER_NXE | _EFER_SCE


def enter_protected_mode(sregs: Sregs, *, gdt: tuple[int, int]) -> None:
    """Change ``sregs``, as KVM_GET_SREGS gave them, to 32-bit protected mode with flat segments, without paging.

    That is where a PVH kernel starts (Xen's docs/misc/pvh.markdown). The selectors are those of ``enter_long_mode`` at
    privilege level 0.

    Args:
        sregs: changed in place.
        gdt: address and size in bytes of a table in guest memory that the selectors fit.
    """
    code, data = _SELECTORS[_KERNEL]
    flat = {"limit": 0xFFFF_FFFF, "present": 1, "s": 1, "g": 1, "db": 1}
    sregs.cs = Segment(selector=code, type=_TYPE_CODE, **flat)
    for name in ("ds", "es", "fs", "gs", "ss"):
        setattr(sregs, name, Segment(selector=data, type=_TYPE_DATA, **flat))
    sregs.tr = Segment(limit=0x67, type=_TYPE_BUSY_TSS, present=1)
    sregs.gdt = _table(gdt)
    sregs.idt = Dtable()
    sregs.cr0 = _CR0_ET | _CR0_PE
    sregs.cr3 = sregs.cr4 = sregs.efer = 0


def _table(place: tuple[int, int] | None) -> Dtable:
    return Dtable() if place is None else Dtable(base=place[0], limit=place[1] - 1)
