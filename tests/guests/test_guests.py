from __future__ import annotations

from pathlib import Path

import pytest

import kvmd.guests
from kvmd.guests import GUESTS, HOSTILE
from kvmd.payload.boot import plan_boot
from kvmd.payload.elf import parse_elf
from tests.toolchain import skip_under_another, tool

FOLDER = Path(kvmd.guests.__file__).parent
SOURCES = FOLDER / "src"
ELF = FOLDER / "elf"


def test_the_catalogue_is_what_is_there() -> None:
    assert {guest.path for guest in GUESTS.values()} == set(ELF.glob("*.elf"))
    assert all((SOURCES / f"{name}.c").is_file() for name in GUESTS)


@pytest.mark.parametrize("name", GUESTS)
def test_a_guest_is_small_and_names_no_path(name: str) -> None:
    file = GUESTS[name].path.read_bytes()

    assert len(file) < 16 << 10
    assert str(FOLDER.parents[1]).encode() not in file
    assert b".c" not in file


@pytest.mark.parametrize("name", GUESTS)
def test_a_guest_fits_a_machine_of_two_mebibytes(name: str) -> None:
    boot = plan_boot(
        parse_elf(GUESTS[name].path.read_bytes()),
        memory_size=2 << 20,
        vcpus=4,
        c_bit=45,
        gigabyte_pages=False,
    )

    assert boot.free is not None


def test_every_misbehaviour_is_described_where_it_is_selected() -> None:
    source = (SOURCES / "hostile.c").read_text()

    assert list(HOSTILE) == list(range(1, 17))
    assert all(f"/* {number}:" in source or f"/* {number}, " in source for number in HOSTILE)


@pytest.mark.compiler
def test_the_committed_files_are_what_the_sources_give(tmp_path: Path) -> None:
    """Byte for byte, under the compiler that made them; another compiler makes others."""
    skip_under_another(ELF / "TOOLCHAIN", made="the files were")
    tool("make", "-C", str(SOURCES), f"OUT={tmp_path / 'elf'}", f"OBJ={tmp_path / 'obj'}")

    for guest in GUESTS.values():
        assert (tmp_path / "elf" / guest.path.name).read_bytes() == guest.path.read_bytes(), guest.name
    assert (tmp_path / "elf" / "TOOLCHAIN").read_text() == (ELF / "TOOLCHAIN").read_text()
