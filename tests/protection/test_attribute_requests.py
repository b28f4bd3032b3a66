"""What the conversion service and the exit handler ask of the protections that convert by attributes."""

from __future__ import annotations

import pytest

from kvmd.conversion.messages import MmioAccess
from kvmd.hv.exits import MemoryFault
from kvmd.protection.base import Protection
from kvmd.units import PAGE_SIZE
from tests.protection.attribute_rig import C_BIT, MEMORY, PRIVATE, SHARED, Rig, pages

pytestmark = pytest.mark.usefixtures("_small_slots")


def test_two_views_are_told_by_the_c_bit() -> None:
    rig = Rig("attribute")
    protection: Protection = rig.protection
    assert protection.locate(1 << C_BIT | 0x1234) == (0x1234, PRIVATE)
    assert protection.locate(0x1234) == (0x1234, SHARED)
    assert protection.locate(MEMORY * PAGE_SIZE) == (MEMORY * PAGE_SIZE, None)
    assert protection.wanted(MemoryFault(1 << C_BIT | 0x5000, 0x1000, private=True)) == (0x5000, PRIVATE)
    assert protection.wanted(MemoryFault(0x5000, 0x1000, private=True)) == (0x5000, SHARED)
    assert protection.asks_by_address()
    assert protection.access_in_place(MmioAccess(0x5000, 4, None)) is None
    rig.close()


def test_one_view_is_what_the_page_is_and_a_fault_what_its_flag_says() -> None:
    rig = Rig("guest-memfd")
    protection: Protection = rig.protection
    assert protection.locate(0x1234) == (0x1234, SHARED), "pinned"
    assert protection.locate(9 * PAGE_SIZE) == (9 * PAGE_SIZE, PRIVATE)
    assert protection.locate(MEMORY * PAGE_SIZE) == (MEMORY * PAGE_SIZE, None)
    assert protection.wanted(MemoryFault(0x5000, 0x1000, private=True)) == (0x5000, PRIVATE)
    assert protection.wanted(MemoryFault(0x5000, 0x1000, private=False)) == (0x5000, SHARED)
    rig.close()


def test_the_host_accesses_shared_memory_only() -> None:
    rig = Rig("guest-memfd")
    protection = rig.protection
    store, load = MmioAccess(9 * PAGE_SIZE + 8, 4, b"abcd"), MmioAccess(9 * PAGE_SIZE + 6, 8, None)
    assert not protection.asks_by_address()
    for access in (store, load):
        assert protection.access_in_place(access) is None
    rig.convert(9, 10, SHARED)
    assert protection.access_in_place(store) == b""
    assert protection.access_in_place(load) == b"\0\0abcd\0\0"
    assert protection.access(SHARED, load) == b"\0\0abcd\0\0"
    rig.close()


def test_a_diagnosis_names_the_likely_cause() -> None:
    rig = Rig("guest-memfd")
    assert rig.protection.diagnose(pages(1, 2), PRIVATE) == "its memslot has no guest_memfd"
    assert "emulate" in rig.protection.diagnose(pages(9, 10), PRIVATE)
    assert "host memory" in rig.protection.diagnose(pages(9, 10), SHARED)
    rig.protection.close()
    assert rig.protection.diagnose(pages(9, 10), PRIVATE) == "its memslot is gone"
    rig.close()
