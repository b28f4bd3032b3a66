"""The small parts of the software CPU: memory, MMIO, instructions, CPUID, the emulator's stop."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmd.errors import HostError
from kvmd.hv.exits import Mmio
from kvmd.memory.backing import Backing
from kvmd.ranges import GpaRange, PageState
from kvmd.software.availability import missing_emulator
from kvmd.software.instruction import StringIo, hypercall_length, may_be_an_extension, string_io
from kvmd.software.memory import GuestMemory
from kvmd.software.mmio import MmioAccesses
from kvmd.software.page_walk import Access
from kvmd.software.vector_code import vector_instructions

PRIVATE, SHARED = PageState.PRIVATE, PageState.SHARED
C = 1 << 47
SIZE = 0x10000


@pytest.fixture
def backings() -> Iterator[dict[PageState, Backing]]:
    with Backing("shared", SIZE) as shared, Backing("private", SIZE) as private:
        yield {SHARED: shared, PRIVATE: private}


@pytest.fixture
def memory(backings: dict[PageState, Backing]) -> Iterator[GuestMemory]:
    addresses = {view: backing.address for view, backing in backings.items()}
    found = GuestMemory(SIZE, addresses, c_bit=47, initial=PRIVATE)
    yield found
    found.close()


def test_exactly_one_view_of_a_page_is_live(memory: GuestMemory) -> None:
    assert memory.is_live(C | 0x3000)
    assert not memory.is_live(0x3000)
    memory.make_live(GpaRange(0x3000, 0x5000), SHARED)
    assert [memory.is_live(gpa) for gpa in (0x2000, 0x3000, 0x4FFF, 0x5000)] == [False, True, True, False]
    assert [memory.is_live(C | gpa) for gpa in (0x2000, 0x3000, 0x4FFF, 0x5000)] == [True, False, False, True]
    memory.make_live(GpaRange(0x3000, 0x4000), PRIVATE)
    assert memory.is_live(C | 0x3000)


def test_only_live_memory_is_read(memory: GuestMemory, backings: dict[PageState, Backing]) -> None:
    backings[PRIVATE].write(0x3010, b"secret")
    assert memory.read(C | 0x3010, 6) == b"secret"
    assert memory.read(0x3010, 6) is None
    assert memory.read(SIZE, 6) is None
    assert memory.read_entry(C | 0x3010) == int.from_bytes(b"secret", "little")
    memory.write(C | 0x3010, b"other.")
    assert backings[PRIVATE].read(0x3010, 6) == b"other."
    assert (memory.is_inside(C | SIZE), memory.is_private(C), memory.is_private(0)) == (False, True, False)


def test_one_view_alone_is_live_everywhere() -> None:
    with Backing("shared", SIZE) as shared:
        memory = GuestMemory(SIZE, {SHARED: shared.address}, c_bit=None, initial=SHARED)
        assert memory.is_live(0x3000)
        assert list(memory.regions) == [(0, shared.address)]
        memory.close()


@pytest.mark.software
def test_the_host_writes_over_code(memory: GuestMemory) -> None:
    from kvmd.software.vm import SoftwareVm  # noqa: PLC0415 - needs the emulator

    vm = SoftwareVm(memory)
    memory.code.touch(memory.in_view(0x3000, SHARED) >> 12, Access.FETCH)
    vm.note_written(GpaRange(0x4000, 0x5000), SHARED)
    assert memory.code.generation == 0
    vm.note_written(GpaRange(0x2000, 0x4000), SHARED)
    assert memory.code.generation == 1


def test_a_backing_tells_of_what_the_host_writes(backings: dict[PageState, Backing]) -> None:
    told: list[GpaRange] = []
    backings[SHARED].on_write = told.append
    backings[SHARED].write(0x2FFF, b"ab")
    backings[SHARED].write(0x2FFF, b"")
    assert told == [GpaRange(0x2000, 0x4000)]


def test_the_accesses_of_one_instruction_are_kept_until_it_is_completed() -> None:
    accesses = MmioAccesses()
    accesses.settle()
    assert not accesses.is_open
    accesses.tell(Mmio(0x20_0004, 4, is_write=False, data=b""), 0x1000)
    accesses.settle(b"abcd")
    accesses.settle()
    ((page, contents),) = accesses.loads()
    assert (page, contents[:10]) == (0x20_0000, b"\xff\xff\xff\xffabcd\xff\xff")
    accesses.tell(Mmio(0x20_0004, 4, is_write=True, data=b"wxyz"), 0x1000)
    assert not accesses.takes_store(0x20_0000)
    accesses.settle()
    assert accesses.takes_store(0x20_0000)
    accesses.tell(Mmio(0x30_0000, 1, is_write=False, data=b""), 0x1004)
    assert accesses.loads() == []
    accesses.clear()
    assert not accesses.is_open


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("6c", StringIo(repeated=False, narrow=False)),
        ("f36f", StringIo(repeated=True, narrow=False)),
        ("67f2666d", StringIo(repeated=True, narrow=True)),
        ("ec", None),
        ("66", None),
        ("", None),
    ],
)
def test_string_instructions_are_known(code: str, found: StringIo | None) -> None:
    assert string_io(bytes.fromhex(code)) == found


def test_hypercalls_and_extensions_are_known() -> None:
    assert [hypercall_length(bytes.fromhex(code)) for code in ("0f01c1", "0f01d9", "0f01f8", "0f")] == [3, 3, 0, 0]
    unknown = ["0f0b", "0fb9c0", "06", "f0ffc0", "", "0f", "48"]
    extensions = ["f30fc7f8", "660f38f6c1", "0f3accc100", "c5f877", "62f17c48", "660fae38"]
    assert [may_be_an_extension(bytes.fromhex(code)) for code in unknown] == [False] * len(unknown)
    assert [may_be_an_extension(bytes.fromhex(code)) for code in extensions] == [True] * len(extensions)


@pytest.mark.parametrize(
    ("code", "offsets"),
    [
        ("90 c5f9efc0 90", [1]),
        ("90 65 41 c5f9", [3, 2, 1]),
        ("c4e270f2c2", []),  # andn
        ("c4e3fbf0c0 00", []),  # rorx
        ("c4e27198c2", [0]),  # a fused multiplication
        ("c400c5", [2]),  # no map of that number; and an end that says nothing
        ("000000", []),
    ],
)
def test_vector_instructions_are_found_wherever_they_may_begin(code: str, offsets: list[int]) -> None:
    assert list(vector_instructions(bytes.fromhex(code), len(bytes.fromhex(code)))) == offsets


def test_what_begins_behind_the_page_is_not_the_pages() -> None:
    assert list(vector_instructions(b"\x90\x90\xc5\xf9", 2)) == []


@pytest.mark.software
def test_vcpus_differ_in_cpuid_by_their_number_alone() -> None:
    from kvmd.software.cpuid import cpuid  # noqa: PLC0415 - needs the emulator

    first, second = cpuid(0, 1, 0), cpuid(7, 1, 0)
    assert first[1] >> 24 == 0
    assert second[1] >> 24 == 7
    assert (first[0], first[2:]) == (second[0], second[2:])
    osxsave_and_avx = 1 << 27 | 1 << 28
    assert not first[2] & osxsave_and_avx
    assert cpuid(0, 7, 0)[1] & 1 << 5 == 0, "no AVX2"
    assert cpuid(0, 0x8000_0008, 0)[0] & 0xFF == 48
    assert cpuid(0, 0x4000_0000, 0) == (0, 0, 0, 0)
    assert cpuid(3, 0xB, 0)[3] == 3


@pytest.mark.software
def test_another_kind_of_host_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvmd.software.attention import Attention  # noqa: PLC0415 - needs the emulator

    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(HostError, match="needs a host of type x86_64, not aarch64"):
        Attention()


def test_a_missing_emulator_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys  # noqa: PLC0415 - for this alone

    monkeypatch.setitem(sys.modules, "unicorn", None)
    message = missing_emulator.__wrapped__() or ""
    assert "install kvmd[software]" in message
    assert "\n" not in message


def test_the_extra_all_holds_every_extra() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    software = re.search(r"^software = (.*)$", text, re.MULTILINE)
    everything = re.search(r"^all = (.*)$", text, re.MULTILINE)
    assert software is not None
    assert everything is not None
    assert software[1] == everything[1]
