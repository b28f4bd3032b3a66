from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmd.errors import BackendError, HostError
from kvmd.memory.backing import Backing
from kvmd.ranges import GpaRange
from kvmd.units import PAGE_SIZE, TIB

SIZE = 16 * PAGE_SIZE


@pytest.fixture
def backing() -> Iterator[Backing]:
    with Backing("private", SIZE) as found:
        yield found


def mappings(name: str) -> int:
    return Path("/proc/self/maps").read_text().count(f"kvmd-{name}")


def test_fresh_memory_is_zeros_and_holds_nothing(backing: Backing) -> None:
    assert backing.held_bytes() == 0
    assert backing.read(0, SIZE) == bytes(SIZE)


def test_what_is_written_is_read(backing: Backing) -> None:
    backing.write(PAGE_SIZE - 3, b"across")
    assert backing.read(PAGE_SIZE - 4, 8) == b"\0across\0"
    assert backing.held_bytes() == 2 * PAGE_SIZE


def test_the_ends_of_memory_are_within(backing: Backing) -> None:
    backing.write(0, b"a")
    backing.write(SIZE - 1, b"z")
    assert backing.read(0, SIZE) == b"a" + bytes(SIZE - 2) + b"z"
    assert backing.read(SIZE, 0) == b""


def test_a_discard_gives_the_memory_back_and_leaves_zeros(backing: Backing) -> None:
    backing.write(0, b"x" * SIZE)
    assert backing.held_bytes() == SIZE
    backing.discard(GpaRange(2 * PAGE_SIZE, 5 * PAGE_SIZE))
    assert backing.held_bytes() == SIZE - 3 * PAGE_SIZE
    expected = b"x" * (2 * PAGE_SIZE) + bytes(3 * PAGE_SIZE) + b"x" * (11 * PAGE_SIZE)
    assert backing.read(0, SIZE) == expected
    backing.write(3 * PAGE_SIZE, b"again")
    assert backing.read(3 * PAGE_SIZE, 6) == b"again\0"


def test_a_discard_of_nothing_is_harmless(backing: Backing) -> None:
    backing.discard(GpaRange(0, SIZE))
    assert backing.held_bytes() == 0


@pytest.mark.parametrize(("gpa", "size"), [(-1, 1), (SIZE, 1), (SIZE - 1, 2), (0, SIZE + 1), (0, -1), (1 << 62, 8)])
def test_nothing_outside_is_read_or_written(backing: Backing, gpa: int, size: int) -> None:
    with pytest.raises(IndexError, match="are outside private memory"):
        backing.read(gpa, size)
    if size >= 0:
        with pytest.raises(IndexError, match="are outside private memory"):
            backing.write(gpa, bytes(min(size, SIZE + 1)))
    assert backing.held_bytes() == 0


def test_addresses_are_those_of_one_mapping(backing: Backing) -> None:
    assert backing.address_of(0x1234) == backing.address + 0x1234
    assert mappings("private") == 1


def test_closing_twice_is_harmless_and_closed_memory_is_refused(backing: Backing) -> None:
    backing.close()
    backing.close()
    assert mappings("private") == 0
    with pytest.raises(IndexError, match="or it is closed"):
        backing.read(0, 1)
    with pytest.raises(IndexError, match="or it is closed"):
        backing.write(0, b"x")
    with pytest.raises(BackendError, match=r"discarding private \[0x0, 0x1000\)") as caught:
        backing.discard(GpaRange(0, PAGE_SIZE))
    assert caught.value.errno == errno.EBADF


def test_two_sides_are_two_memories(backing: Backing) -> None:
    with Backing("shared", SIZE) as other:
        backing.write(0, b"secret")
        assert other.held_bytes() == 0
        assert other.read(0, 6) == bytes(6)


@pytest.mark.parametrize("size", [1 << 62, (1 << 63) - PAGE_SIZE, 1 << 63, 1 << 64, 1 << 100, 0, -PAGE_SIZE])
def test_a_size_that_no_host_has_is_a_host_error(size: int) -> None:
    with pytest.raises(HostError, match=r"memory: this host cannot map .*: ask for less"):
        Backing("private", size)
    assert mappings("private") == 0


def test_a_terabyte_holds_nothing_until_it_is_touched() -> None:
    with Backing("private", TIB) as backing:
        assert backing.held_bytes() == 0
        backing.write(TIB - 1, b"z")
        assert backing.held_bytes() == PAGE_SIZE
        backing.discard(GpaRange(0, TIB))
        assert backing.held_bytes() == 0


def test_only_what_is_held_has_to_be_emptied(backing: Backing, monkeypatch: pytest.MonkeyPatch) -> None:
    discarded: list[GpaRange] = []
    discard = backing.discard

    def spy(range_: GpaRange) -> None:
        discarded.append(range_)
        discard(range_)

    monkeypatch.setattr(backing, "discard", spy)
    third, rest = GpaRange(2 * PAGE_SIZE, 3 * PAGE_SIZE), GpaRange(3 * PAGE_SIZE, SIZE)
    backing.empty(third)
    backing.write(3 * PAGE_SIZE, b"x")
    backing.empty(third)
    assert discarded == []
    backing.empty(rest)
    assert discarded == [rest]
    assert backing.held_bytes() == 0
    backing.empty(rest)
    assert discarded == [rest]
