"""The tables that a guest finds: RSDP, XSDT, FADT, MADT and DSDT, as bytes for an address.

Source: ACPI 6.5, chapter 5. The machine is hardware-reduced (4.1): it has neither the fixed registers of a PC's chipset
nor its SCI and PM timer, which kvmd would have to emulate, and which would make a kernel look for more of a PC. The
kernel then takes its time from kvmclock and the TSC, and powers off through the sleep control register.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from kvmd.acpi import aml
from kvmd.errors import ConfigError

_OEM = b"KVMD  "
_OEM_TABLE = b"KVMD    "
_CREATOR = b"KVMD"
_HEADER = struct.Struct("<4sIBB6s8sI4sI")
_ALIGNMENT = 16

_FADT_REVISION, _FADT_MINOR = 6, 5
_FADT_SIZE = 276
_FLAG_WBINVD = 1 << 0
_FLAG_NO_FIXED_POWER_BUTTON = 1 << 4
_FLAG_NO_SLEEP_BUTTON = 1 << 5
_FLAG_RESET_REGISTER = 1 << 10
_FLAG_HEADLESS = 1 << 12
_FLAG_HARDWARE_REDUCED = 1 << 20
_BOOT_NO_VGA = 1 << 2
_BOOT_NO_RTC = 1 << 5
_PORT_SPACE = 1
_BYTE_ACCESS = 1

_MADT_REVISION = 5
_MADT_PCAT_COMPATIBLE = 1
_XAPIC_LIMIT = 255
"""APIC ids from here on need the x2APIC's structure."""

_BUTTON_PRESSED = 0x80
"""What a power button tells its driver (table 5.166)."""

_ALL_PROCESSORS_XAPIC = 0xFF
_ALL_PROCESSORS_X2APIC = 0xFFFF_FFFF
_ENABLED = 1


@dataclass(frozen=True, slots=True)
class VirtioWindow:
    """A virtio device over MMIO.

    Attributes:
        gpa: of its registers.
        size_bytes: of them.
        gsi: its interrupt line.
    """

    gpa: int
    size_bytes: int
    gsi: int


@dataclass(frozen=True, slots=True)
class AcpiMachine:
    """What the tables tell of.

    Attributes:
        processors: how many, their APIC ids from 0.
        local_apic: gpa of each processor's local APIC.
        ioapic: gpa of the IOAPIC, whose first interrupt line is 0.
        serial_port: its first I/O port, and its interrupt line.
        sleep_port: the sleep control register's I/O port, with the sleep status register behind it.
        sleep_type: what is written there to power off.
        reset_port: the reset register's I/O port.
        reset_value: what is written there to reset.
        panic_port: pvpanic's I/O port.
        button_gsi: the interrupt line of the power button.
        virtio: the virtio devices, in order.
    """

    processors: int
    local_apic: int
    ioapic: int
    serial_port: tuple[int, int]
    sleep_port: int
    sleep_type: int
    reset_port: int
    reset_value: int
    panic_port: int
    button_gsi: int
    virtio: Sequence[VirtioWindow] = ()


def build_tables(machine: AcpiMachine, *, gpa: int, limit_bytes: int) -> bytes:
    """Return all tables for the address ``gpa``, a multiple of 16; the RSDP is the first.

    Args:
        machine: what they tell of.
        gpa: where they will lie.
        limit_bytes: how much room there is.

    Raises:
        ConfigError: they need more room.
    """
    area = bytearray(64)  # the RSDP is made last

    def put(table: bytes) -> int:
        address = gpa + len(area)
        area.extend(table.ljust(-(-len(table) // _ALIGNMENT) * _ALIGNMENT, b"\0"))
        return address

    dsdt = put(build_dsdt(machine))
    fadt = put(build_fadt(machine, dsdt))
    madt = put(build_madt(machine))
    xsdt = put(_table(b"XSDT", 1, struct.pack("<2Q", fadt, madt)))
    if len(area) > limit_bytes:
        raise ConfigError(f"vcpus: {machine.processors} are too many for the {limit_bytes} bytes of ACPI's tables")
    rsdp = _rsdp(xsdt)
    area[: len(rsdp)] = rsdp
    return bytes(area)


def build_dsdt(machine: AcpiMachine) -> bytes:
    """Return the table of devices."""
    port, gsi = machine.serial_port
    serial = aml.device(
        "COM1",
        (
            aml.name("_HID", aml.eisa_id("PNP0501")),
            aml.name("_UID", aml.integer(1)),
            aml.name("_CRS", aml.resources((aml.ports(port, 8), aml.edge_interrupt(gsi)))),
        ),
    )
    panic = aml.device(
        "PEVT",
        (
            aml.name("_HID", aml.string("QEMU0001")),
            aml.name("_UID", aml.integer(1)),
            aml.name("_STA", aml.integer(0xF)),
            aml.name("_CRS", aml.resources((aml.ports(machine.panic_port, 1),))),
        ),
    )
    # A machine without fixed registers has its power button as a device, which an event device tells of (5.6.9).
    button = aml.device("PWRB", (aml.name("_HID", aml.eisa_id("PNP0C0C")), aml.name("_UID", aml.integer(0))))
    events = aml.device(
        "GED0",
        (
            aml.name("_HID", aml.string("ACPI0013")),
            aml.name("_UID", aml.integer(0)),
            aml.name("_CRS", aml.resources((aml.edge_interrupt(machine.button_gsi),))),
            aml.method("_EVT", 1, (aml.notify("PWRB", _BUTTON_PRESSED),)),
        ),
    )
    virtio = (
        aml.device(
            f"VR{index:02X}",
            (
                aml.name("_HID", aml.string("LNRO0005")),
                aml.name("_UID", aml.integer(index)),
                aml.name("_CCA", aml.integer(1)),
                aml.name(
                    "_CRS",
                    aml.resources((aml.memory(window.gpa, window.size_bytes), aml.edge_interrupt(window.gsi))),
                ),
            ),
        )
        for index, window in enumerate(machine.virtio)
    )
    off = aml.package([aml.integer(machine.sleep_type), *[aml.integer(0)] * 3])
    return _table(b"DSDT", 2, aml.scope("_SB", (serial, panic, button, events, *virtio)) + aml.name("_S5", off))


def build_fadt(machine: AcpiMachine, dsdt: int) -> bytes:
    """Return the fixed table, for a DSDT at the address ``dsdt``."""
    table = bytearray(_FADT_SIZE - _HEADER.size)

    def put(form: str, offset: int, *values: int) -> None:
        struct.pack_into(form, table, offset - _HEADER.size, *values)

    put("<H", 109, _BOOT_NO_VGA | _BOOT_NO_RTC)
    put(
        "<I",
        112,
        _FLAG_WBINVD
        | _FLAG_NO_FIXED_POWER_BUTTON
        | _FLAG_NO_SLEEP_BUTTON
        | _FLAG_RESET_REGISTER
        | _FLAG_HEADLESS
        | _FLAG_HARDWARE_REDUCED,
    )
    put("<BBBBQ", 116, *_byte_port(machine.reset_port))
    put("<B", 128, machine.reset_value)
    put("<B", 131, _FADT_MINOR)
    put("<Q", 140, dsdt)
    put("<BBBBQ", 244, *_byte_port(machine.sleep_port))
    put("<BBBBQ", 256, *_byte_port(machine.sleep_port + 1))
    table[268 - _HEADER.size :] = _OEM_TABLE  # the hypervisor's vendor
    return _table(b"FACP", _FADT_REVISION, bytes(table))


def build_madt(machine: AcpiMachine) -> bytes:
    """Return the table of interrupt controllers."""
    entries = [
        struct.pack("<BBBBI", 0, 8, index, index, _ENABLED)
        if index < _XAPIC_LIMIT
        else struct.pack("<BBHIII", 9, 16, 0, index, _ENABLED, index)
        for index in range(machine.processors)
    ]
    entries.append(struct.pack("<BBBBII", 1, 12, 0, 0, machine.ioapic, 0))
    # LINT1 of every processor is the NMI, as kvmd has set it up.
    entries.append(struct.pack("<BBBHB", 4, 6, _ALL_PROCESSORS_XAPIC, 0, 1))
    if machine.processors > _XAPIC_LIMIT:
        entries.append(struct.pack("<BBHIB3x", 10, 12, 0, _ALL_PROCESSORS_X2APIC, 1))
    body = struct.pack("<II", machine.local_apic, _MADT_PCAT_COMPATIBLE) + b"".join(entries)
    return _table(b"APIC", _MADT_REVISION, body)


def _byte_port(port: int) -> tuple[int, int, int, int, int]:
    """Return a register of one byte at an I/O port as a Generic Address Structure (5.2.3.2)."""
    return _PORT_SPACE, 8, 0, _BYTE_ACCESS, port


def _rsdp(xsdt: int) -> bytes:
    """Return the root pointer (5.2.5.3), of revision 2."""
    size = 36
    pointer = bytearray(struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, _OEM, 2, 0, size, xsdt, 0))
    pointer[8] = _checksum(pointer[:20])
    pointer[32] = _checksum(pointer)
    return bytes(pointer)


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    size = _HEADER.size + len(body)
    table = bytearray(_HEADER.pack(signature, size, revision, 0, _OEM, _OEM_TABLE, 1, _CREATOR, 1) + body)
    table[9] = _checksum(table)
    return bytes(table)


def _checksum(data: bytes | bytearray) -> int:
    """Return the byte that makes the sum of all bytes 0."""
    return -sum(data) & 0xFF
