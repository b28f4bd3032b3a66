"""The guest's own page tables, walked as a processor would: numbers only, no I/O.

Four levels of 512 entries (AMD64 APM volume 2, 5.3). A and D bits are not set: no payload looks at them.
"""

from __future__ import annotations

import enum
from collections.abc import Callable

from kvmd.units import PAGE_MASK

_PRESENT = 1 << 0
_WRITABLE = 1 << 1
_USER = 1 << 2
_LARGE = 1 << 7
_NO_EXECUTE = 1 << 63
_ADDRESS = 0x000F_FFFF_FFFF_F000
_INDEX_MASK = 0x1FF
_CANONICAL_BITS = 47
_PML4_SHIFT, _PDPT_SHIFT, _PD_SHIFT, _PT_SHIFT = 39, 30, 21, 12


class Access(enum.IntEnum):
    """What an access does; the values are Unicorn's (UC_MEM_READ, UC_MEM_WRITE, UC_MEM_FETCH)."""

    READ = 16
    WRITE = 17
    FETCH = 18


def walk(
    read_entry: Callable[[int], int | None], cr3: int, address: int, access: Access = Access.READ, *, user: bool = False
) -> int | None:
    """Return the gpa, C-bit included, of the page that ``address`` is in; None where the access is a page fault.

    Args:
        read_entry: returns the eight bytes of a table at a gpa, C-bit included; None where the guest cannot read them.
        cr3: the root, C-bit included.
        address: virtual; a page fault where it is not canonical.
        access: checked against what the entries allow, supervisors included (CR0.WP and EFER.NXE are set).
        user: the access is made at CPL 3.
    """
    if (address >> _CANONICAL_BITS) not in (0, 0x1FFFF):
        return None
    allowed = _WRITABLE | _USER
    denied = 0
    table = cr3 & _ADDRESS
    shift = _PML4_SHIFT
    while True:
        entry = read_entry(table + ((address >> shift) & _INDEX_MASK) * 8)
        if entry is None or not entry & _PRESENT:
            return None
        allowed &= entry
        denied |= entry & _NO_EXECUTE
        if shift == _PT_SHIFT or (entry & _LARGE and shift != _PML4_SHIFT):
            break
        table = entry & _ADDRESS
        shift -= 9
    if (
        (user and not allowed & _USER)
        or (access == Access.WRITE and not allowed & _WRITABLE)
        or (access == Access.FETCH and denied)
    ):
        return None
    offset_mask = (1 << shift) - 1
    return (entry & _ADDRESS & ~offset_mask) | (address & offset_mask & ~PAGE_MASK)
