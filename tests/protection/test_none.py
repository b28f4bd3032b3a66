from __future__ import annotations

import pytest

from kvmd.conversion.changes import FailureKind
from kvmd.conversion.messages import MmioAccess
from kvmd.hv.exits import MemoryFault
from kvmd.protection.base import Protection
from kvmd.protection.none import NoProtection
from kvmd.ranges import GpaRange, PageState

SIZE = 0x10000


@pytest.fixture
def protection() -> Protection:
    return NoProtection(SIZE)


def test_all_memory_is_in_the_one_view(protection: Protection) -> None:
    assert protection.locate(0) == (0, PageState.SHARED)
    assert protection.locate(SIZE - 1) == (SIZE - 1, PageState.SHARED)
    assert protection.locate(SIZE) == (SIZE, None)


@pytest.mark.parametrize(("private", "state"), [(True, PageState.PRIVATE), (False, PageState.SHARED)])
def test_a_fault_wants_what_its_flags_say(protection: Protection, private: bool, state: PageState) -> None:  # noqa: FBT001  a parameter
    assert protection.wanted(MemoryFault(0x3000, 0x1000, private)) == (0x3000, state)


@pytest.mark.parametrize("to", PageState)
def test_nothing_converts(protection: Protection, to: PageState) -> None:
    applied = protection.apply(GpaRange(0x1000, 0x3000), to)
    assert applied.end == 0x1000
    assert applied.failure is not None
    assert applied.failure.kind is FailureKind.REFUSED
    assert f"cannot convert [0x1000, 0x3000) to {to.value}" in applied.failure.message


def test_an_access_finds_an_address_that_nothing_backs(protection: Protection) -> None:
    assert protection.access(PageState.SHARED, MmioAccess(0x1000, 4, None)) == b"\xff" * 4
    assert protection.access(PageState.SHARED, MmioAccess(0x1000, 4, b"abcd")) == b""
    assert not protection.asks_by_address()
    assert protection.access_in_place(MmioAccess(0x1000, 4, None)) == b"\xff" * 4


def test_the_rest_does_nothing() -> None:
    protection = NoProtection(SIZE)
    protection.discard(GpaRange(0, SIZE), PageState.SHARED)
    protection.close()
    protection.close()
    assert protection.facts() == {"protection": "none"}
