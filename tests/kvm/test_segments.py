from __future__ import annotations

import pytest

from kvmd.kvm.segments import enter_long_mode
from kvmd.kvm.uapi import Sregs

SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss")


@pytest.mark.parametrize("cpl", [0, 3])
def test_segments_agree_on_the_privilege_level(cpl: int) -> None:
    sregs = Sregs()
    enter_long_mode(sregs, cr3=0x8000_0000_1000, cpl=cpl)
    for name in SEGMENTS:
        segment = getattr(sregs, name)
        assert segment.dpl == cpl
        assert segment.selector & 3 == cpl
        assert (segment.present, segment.s, segment.limit) == (1, 1, 0xFFFF_FFFF)
    assert (sregs.cs.l, sregs.cs.db) == (1, 0)
    assert sregs.cr3 == 0x8000_0000_1000
    assert (sregs.cr0, sregs.cr4, sregs.efer) == (0x8005_0033, 0x620, 0xD01)


def test_what_reset_gave_is_kept_and_tables_are_emptied() -> None:
    sregs = Sregs(apic_base=0xFEE0_0900)
    sregs.tr.type = 11
    sregs.gdt.limit = sregs.idt.limit = 0xFFFF
    enter_long_mode(sregs, cr3=0, cpl=3)
    assert sregs.apic_base == 0xFEE0_0900
    assert sregs.tr.type == 11
    assert (sregs.gdt.limit, sregs.idt.limit) == (0, 0)


@pytest.mark.parametrize("cpl", [-1, 1, 2, 4])
def test_no_other_privilege_level(cpl: int) -> None:
    with pytest.raises(ValueError, match="level 0 or 3"):
        enter_long_mode(Sregs(), cr3=0, cpl=cpl)
