"""ACPI's tables against iasl: taken apart and put together again, they are the same bytes."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from kvmd.acpi.tables import AcpiMachine, VirtioWindow, build_dsdt, build_fadt, build_madt, build_tables
from kvmd.errors import ConfigError
from tests.gate import Facility, require_whole

_HEADER_BYTES = 36
GPA = 0xE_0000
ROOM = 0x2_0000


def machine(processors: int = 2, devices: int = 2) -> AcpiMachine:
    return AcpiMachine(
        processors=processors,
        local_apic=0xFEE0_0000,
        ioapic=0xFEC0_0000,
        serial_port=(0x3F8, 4),
        sleep_port=0x600,
        sleep_type=5,
        reset_port=0x604,
        reset_value=1,
        panic_port=0x505,
        button_gsi=3,
        virtio=[VirtioWindow(0xD000_0000 + index * 0x1000, 0x1000, 5 + index) for index in range(devices)],
    )


def tables_of(area: bytes) -> dict[str, bytes]:
    """Return the tables that a guest finds, by signature, each checked as it checks them."""
    assert area[:8] == b"RSD PTR "
    assert sum(area[:20]) % 256 == 0
    assert sum(area[:36]) % 256 == 0
    (xsdt,) = struct.unpack_from("<Q", area, 24)

    def table(gpa: int) -> bytes:
        (size,) = struct.unpack_from("<I", area, gpa - GPA + 4)
        data = area[gpa - GPA : gpa - GPA + size]
        assert len(data) == size
        assert sum(data) % 256 == 0
        return data

    root = table(xsdt)
    found = {data[:4].decode(): data for data in map(table, struct.unpack_from("<2Q", root, _HEADER_BYTES))}
    (dsdt,) = struct.unpack_from("<Q", found["FACP"], 140)
    found["DSDT"] = table(dsdt)
    return found


def iasl(folder: Path, *arguments: str) -> str:
    require_whole(Facility.ACPI)
    program = shutil.which("iasl")
    assert program is not None
    done = subprocess.run([program, *arguments], cwd=folder, capture_output=True, text=True, check=False)  # noqa: S603 - iasl
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("devices", [0, 1, 19])
def test_the_dsdt_is_what_iasl_makes_of_its_own_reading_of_it(tmp_path: Path, devices: int) -> None:
    dsdt = build_dsdt(machine(devices=devices))
    (tmp_path / "dsdt.aml").write_bytes(dsdt)
    said = iasl(tmp_path, "-d", "dsdt.aml")
    assert "error" not in said.lower()
    text = (tmp_path / "dsdt.dsl").read_text()
    assert text.count('"LNRO0005"') == devices
    for what in (
        'EisaId ("PNP0501")',
        '"QEMU0001"',
        'EisaId ("PNP0C0C")',
        '"ACPI0013"',
        "Notify (PWRB, 0x80)",
        "Name (_S5",
        "0x03F8",
    ):
        assert what in text
    assert "0 Errors, 0 Warnings" in iasl(tmp_path, "-p", "again", "dsdt.dsl")
    again = (tmp_path / "again.aml").read_bytes()
    # But for the compiler's name, its version, and the checksum.
    assert (again[:9], again[_HEADER_BYTES:]) == (dsdt[:9], dsdt[_HEADER_BYTES:])


@pytest.mark.parametrize(("name", "processors"), [("facp", 1), ("apic", 1), ("apic", 2), ("apic", 300)])
def test_the_other_tables_are_what_iasl_makes_of_its_own_reading_of_them(
    tmp_path: Path, name: str, processors: int
) -> None:
    table = build_fadt(machine(), GPA + 64) if name == "facp" else build_madt(machine(processors))
    (tmp_path / f"{name}.aml").write_bytes(table)
    iasl(tmp_path, "-d", f"{name}.aml")
    assert "0 Errors, 0 Warnings" in iasl(tmp_path, "-p", "again", f"{name}.dsl")
    again = (tmp_path / "again.aml").read_bytes()
    assert (again[:9], again[_HEADER_BYTES:]) == (table[:9], table[_HEADER_BYTES:])


def test_a_guest_finds_every_table_with_the_right_sums() -> None:
    found = tables_of(build_tables(machine(), gpa=GPA, limit_bytes=ROOM))
    assert found.keys() == {"FACP", "APIC", "DSDT"}
    (flags,) = struct.unpack_from("<I", found["FACP"], 112)
    assert flags & 1 << 20  # hardware-reduced
    assert flags & 1 << 10  # with a reset register


def test_each_processor_has_its_entry() -> None:
    madt = build_madt(machine(processors=300))
    at, ids = _HEADER_BYTES + 8, []
    while at < len(madt):
        kind, size = madt[at], madt[at + 1]
        if kind == 0:
            ids.append(madt[at + 3])
        elif kind == 9:
            ids += struct.unpack_from("<I", madt, at + 4)
        at += size
    assert ids == list(range(300))


def test_processors_beyond_the_room_are_refused() -> None:
    with pytest.raises(ConfigError, match="vcpus: 9000 are too many"):
        build_tables(machine(processors=9000), gpa=GPA, limit_bytes=ROOM)
