"""Where things are in a Linux machine's guest-physical addresses: numbers only.

::

    0x00000000  ┌──────────────────────────┐
                │ memory: boot parameters  │  first 640 KiB
    0x000a0000  ├──────────────────────────┤
                │ reserved: ACPI tables,   │
                │ the reset vector         │
    0x00100000  ├──────────────────────────┤
                │ memory                   │
    0xc0000000  ├──────────────────────────┤
                │ virtio devices           │  a page each, from 0xd0000000
                │ IOAPIC, local APICs      │
    0x100000000 ├──────────────────────────┤
                │ memory beyond 3 GiB      │
                └──────────────────────────┘
"""

from __future__ import annotations

from kvmd.ranges import GpaRange
from kvmd.units import GIB, PAGE_SIZE

CONVENTIONAL_END = 0xA_0000
"""End of the memory that a PC always had: what lies above, up to 1 MiB, is the firmware's."""

ACPI_TABLES = GpaRange(0xE_0000, 0xF_F000)
"""Where ACPI's tables are: a kernel that is not told finds them here (ACPI 6.5, 5.2.5.1)."""

RESET_VECTOR = 0xF_FFF0
"""Where a processor in real mode goes to reset the machine: 16 bytes of the firmware's last page below 1 MiB."""

LOW_MEMORY_END = 3 * GIB
"""Memory from here on moves above 4 GiB."""

HIGH_MEMORY_START = 4 * GIB

DEVICES_START = 0xD000_0000
"""Of the first virtio device's registers."""

DEVICE_SIZE = PAGE_SIZE
"""Bytes of a virtio device's registers. The specification asks for 0x100 and the configuration (4.2.2)."""

IOAPIC = 0xFEC0_0000
LOCAL_APIC = 0xFEE0_0000

IDENTITY_MAP = 0xFFFB_C000
"""A page that Intel's processors need for real mode (KVM_SET_IDENTITY_MAP_ADDR)."""

TSS = 0xFFFB_D000
"""Three pages likewise (KVM_SET_TSS_ADDR)."""

IOAPIC_PINS = 24

COM1 = 0x3F8
COM1_GSI = 4
BUTTON_GSI = 3
"""Interrupt line of the power button: a PC's second serial port has it, which there is not."""

DEVICE_GSIS = range(5, IOAPIC_PINS)
"""Interrupt lines of the virtio devices, in their order."""


def memory_ranges(size_bytes: int) -> tuple[GpaRange, ...]:
    """Return where ``size_bytes`` of memory lie: one range, or two around the devices."""
    if size_bytes <= LOW_MEMORY_END:
        return (GpaRange(0, size_bytes),)
    return (
        GpaRange(0, LOW_MEMORY_END),
        GpaRange.of_size(HIGH_MEMORY_START, size_bytes - LOW_MEMORY_END),
    )
