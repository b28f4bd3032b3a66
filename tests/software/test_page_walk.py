from __future__ import annotations

import pytest

from kvmd.software.page_walk import Access, walk

P, W, U, LARGE, NX = 1, 2, 4, 0x80, 1 << 63
C_BIT = 1 << 47
ROOT = 0x1000


def tables(leaf: int, *, middle: int = P | W | U, large_at: int = 3) -> dict[int, int]:
    """Return entries that map address 0x7f_1234_5678 through four levels, or fewer with a large leaf."""
    address = 0x7F_1234_5678
    found = {}
    table = ROOT
    for level, shift in enumerate((39, 30, 21, 12)):
        index = address >> shift & 0x1FF
        if level == large_at:
            found[table + 8 * index] = leaf
            return found
        found[table + 8 * index] = 0x10_0000 + 0x1000 * level | middle
        table = 0x10_0000 + 0x1000 * level
    return found


ADDRESS = 0x7F_1234_5678


@pytest.mark.parametrize(
    ("leaf", "large_at", "gpa"),
    [
        (0x5000 | P | W | U, 3, 0x5000),
        (0x5000 | P | W | U | C_BIT, 3, 0x5000 | C_BIT),
        (0x40_0000 | P | W | U | LARGE, 2, 0x40_0000 | ADDRESS & 0x1F_F000),
        (0x8000_0000 | P | W | U | LARGE | C_BIT, 1, 0x8000_0000 | C_BIT | ADDRESS & 0x3FFF_F000),
    ],
)
def test_pages_of_every_size(leaf: int, large_at: int, gpa: int) -> None:
    assert walk(tables(leaf, large_at=large_at).get, ROOT, ADDRESS) == gpa


@pytest.mark.parametrize("level", range(4))
def test_an_entry_that_is_not_present_or_cannot_be_read_is_a_fault(level: int) -> None:
    entries = tables(0x5000 | P | W | U)
    place = sorted(entries, key=lambda gpa: (gpa >= 0x10_0000, gpa))[level]
    assert walk((entries | {place: entries[place] & ~P}).get, ROOT, ADDRESS) is None
    del entries[place]
    assert walk(entries.get, ROOT, ADDRESS) is None


@pytest.mark.parametrize("address", [1 << 47, (1 << 64) - (1 << 47) - 1, 1 << 63])
def test_an_address_that_is_not_canonical_is_a_fault(address: int) -> None:
    assert walk(lambda _gpa: P | W | U | LARGE, ROOT, address) is None


def test_the_upper_half_is_canonical() -> None:
    assert walk(lambda _gpa: 0x5000 | P, ROOT, (1 << 64) - (1 << 47)) == 0x5000


@pytest.mark.parametrize(
    ("leaf", "middle", "access", "user", "allowed"),
    [
        (P, P | W | U, Access.READ, False, True),
        (P, P | W | U, Access.READ, True, False),
        (P | U, P | W, Access.READ, True, False),
        (P | U, P | W | U, Access.WRITE, True, False),
        (P | W | U, P | U, Access.WRITE, True, False),
        (P, P | W | U, Access.WRITE, False, False),  # CR0.WP
        (P | W, P | W | U, Access.WRITE, False, True),
        (P | U | NX, P | W | U, Access.FETCH, True, False),
        (P | U, P | W | U | NX, Access.FETCH, True, False),
        (P | U | NX, P | W | U, Access.READ, True, True),
    ],
)
def test_every_level_has_to_allow_an_access(leaf: int, middle: int, access: Access, user: bool, allowed: bool) -> None:  # noqa: FBT001 - a table
    entries = tables(0x5000 | leaf, middle=middle)
    assert walk(entries.get, ROOT, ADDRESS, access, user=user) == (0x5000 if allowed else None)
