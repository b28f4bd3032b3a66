from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmd.errors import HostError
from kvmd.memory import libc
from kvmd.memory.anonymous import AnonymousMemory
from kvmd.ranges import GpaRange
from kvmd.units import MIB, PAGE_SIZE, TIB

HUGE = 2 * MIB
SIZE = 2 * HUGE


@pytest.fixture
def memory() -> Iterator[AnonymousMemory]:
    with AnonymousMemory("shared", SIZE) as found:
        yield found


def of_mapping(address: int, key: str) -> str:
    """Return what the kernel says of the mapping that starts at an address."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        if line.startswith(f"{address:x}-"):
            break
    return next(line.partition(":")[2].strip() for line in lines if line.startswith(f"{key}:"))


def held_kib(memory: AnonymousMemory) -> int:
    return int(of_mapping(memory.address, "Rss").split()[0])


def test_fresh_memory_is_zeros(memory: AnonymousMemory) -> None:
    assert held_kib(memory) == 0
    assert memory.read(0, SIZE) == bytes(SIZE)


def test_what_is_written_is_read_and_seen(memory: AnonymousMemory) -> None:
    memory.write(PAGE_SIZE - 3, b"across")
    assert memory.read(PAGE_SIZE - 4, 8) == b"\0across\0"
    assert bytes(memory.view[PAGE_SIZE - 3 : PAGE_SIZE + 3]) == b"across"


def test_it_may_have_huge_pages_where_both_addresses_are_aligned(memory: AnonymousMemory) -> None:
    assert memory.address_of(HUGE) % HUGE == 0
    flags = of_mapping(memory.address, "VmFlags").split()
    assert "dc" in flags, "a child does not get it"
    if Path("/sys/kernel/mm/transparent_hugepage").exists():
        assert "hg" in flags


def test_a_discard_gives_the_memory_back_and_leaves_zeros(memory: AnonymousMemory) -> None:
    assert memory.held_bytes() == 0
    memory.write(0, b"x" * SIZE)
    assert held_kib(memory) == SIZE // 1024
    assert memory.held_bytes() == SIZE
    memory.discard(GpaRange(HUGE, SIZE))
    assert held_kib(memory) == (SIZE - HUGE) // 1024
    assert memory.held_bytes() == SIZE - HUGE
    assert memory.read(0, SIZE) == b"x" * HUGE + bytes(SIZE - HUGE)
    memory.discard(GpaRange(PAGE_SIZE, 2 * PAGE_SIZE))
    assert memory.read(0, 3 * PAGE_SIZE) == b"x" * PAGE_SIZE + bytes(PAGE_SIZE) + b"x" * PAGE_SIZE


@pytest.mark.parametrize(("gpa", "size"), [(-1, 1), (SIZE, 1), (SIZE - 1, 2), (0, -1), (1 << 62, 8)])
def test_nothing_outside_is_read(memory: AnonymousMemory, gpa: int, size: int) -> None:
    with pytest.raises(IndexError, match="are outside shared memory"):
        memory.read(gpa, size)


def test_closing_twice_is_harmless_and_closed_memory_is_refused() -> None:
    memory = AnonymousMemory("shared", SIZE)
    address = memory.address
    memory.close()
    memory.close()
    assert memory.held_bytes() == 0
    assert f"\n{address:x}-" not in Path("/proc/self/maps").read_text()
    with pytest.raises(IndexError, match="or it is closed"):
        memory.read(0, 1)


@pytest.mark.parametrize("size", [1 << 62, 1 << 63, 1 << 64, 1 << 100, 0, -PAGE_SIZE])
def test_a_size_that_no_host_has_is_a_host_error(size: int) -> None:
    with pytest.raises(HostError, match=r"memory: this host cannot map .*: ask for less"):
        AnonymousMemory("shared", size)


def test_a_terabyte_holds_nothing_until_it_is_touched() -> None:
    with AnonymousMemory("shared", TIB) as memory:
        assert held_kib(memory) == 0
        memory.write(TIB - 1, b"z")
        assert 0 < held_kib(memory) <= HUGE // 1024


@pytest.mark.parametrize("alignment", [PAGE_SIZE, HUGE, 64 * MIB])
def test_what_was_mapped_for_alignment_s_sake_is_given_back(alignment: int) -> None:
    def mapped() -> int:
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")

    before = mapped()
    address = libc.map_anonymous(3 * PAGE_SIZE, alignment=alignment)
    try:
        assert address % alignment == 0
        assert mapped() - before < alignment // 2 + MIB
    finally:
        libc.unmap(address, 3 * PAGE_SIZE)


def test_advice_that_no_kernel_knows_is_an_error_unless_it_does_not_matter(memory: AnonymousMemory) -> None:
    libc.advise(memory.address, SIZE, 9999, ignore_unsupported=True)
    with pytest.raises(OSError, match="madvise 9999"):
        libc.advise(memory.address, SIZE, 9999)
