"""How a Linux guest ends its machine, by ports: ACPI's sleep and reset registers, the keyboard controller, pvpanic.

Sources: ACPI 6.5, 4.8.3.7 (sleep registers) and 4.8.3.6 (reset register); the keyboard controller's command FE, as
the kernel's native_machine_emergency_restart uses it; QEMU's docs/specs/pvpanic.rst.
"""

from __future__ import annotations

import enum
import threading

SLEEP_PORT = 0x600
"""ACPI's sleep control register; the status register follows it."""

RESET_PORT = 0x604
RESET_VALUE = 0x1

KEYBOARD_COMMAND_PORT = 0x64
PANIC_PORT = 0x505

SLEEP_TYPE_OFF = 5
"""What the DSDT says of S5."""

_SLEEP_ENABLE = 1 << 5
_SLEEP_TYPE_SHIFT = 2
_SLEEP_TYPE_MASK = 0x7
_PULSE_RESET = 0xFE
_PANICKED = 1 << 0
_CRASH_LOADED = 1 << 1


class GuestEnd(enum.Enum):
    """What the guest asked for."""

    POWER_OFF = "power-off"
    REBOOT = "reboot"
    PANIC = "panic"


class EndSwitch:
    """Where a guest's wish to end is noted, for the vCPU thread that carried it; the first wish counts."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.wish: GuestEnd | None = None

    def press(self, wish: GuestEnd) -> None:
        """Note the wish."""
        with self._lock:
            if self.wish is None:
                self.wish = wish


class SleepRegisters:
    """ACPI's sleep control (offset 0) and sleep status (offset 1) registers of a hardware-reduced machine."""

    def __init__(self, switch: EndSwitch) -> None:
        self._switch = switch

    def read(self, offset: int) -> int:
        """Return 0: the control register's bits are the guest's to write, and it never woke up."""
        return offset & 0

    def write(self, offset: int, value: int) -> None:
        """Power off where the guest enters S5; it knows of no other sleep."""
        if offset == 0 and value & _SLEEP_ENABLE and value >> _SLEEP_TYPE_SHIFT & _SLEEP_TYPE_MASK == SLEEP_TYPE_OFF:
            self._switch.press(GuestEnd.POWER_OFF)


class ResetRegister:
    """A register that resets the machine when one value is written to it.

    Args:
        switch: where the wish goes.
        value: the one.
    """

    def __init__(self, switch: EndSwitch, value: int) -> None:
        self._switch = switch
        self._value = value

    def read(self, offset: int) -> int:
        """Return 0: of a keyboard controller, that it is ready for a command and has nothing to say."""
        return offset & 0

    def write(self, offset: int, value: int) -> None:
        """Reset where it is the value."""
        if offset == 0 and value == self._value:
            self._switch.press(GuestEnd.REBOOT)


def acpi_reset(switch: EndSwitch) -> ResetRegister:
    """Return ACPI's reset register."""
    return ResetRegister(switch, RESET_VALUE)


def keyboard_reset(switch: EndSwitch) -> ResetRegister:
    """Return what is there of a keyboard controller: the command that pulses the reset line."""
    return ResetRegister(switch, _PULSE_RESET)


class PanicPort:
    """pvpanic: a guest's kernel says that it panicked.

    A guest that has loaded a crash kernel says so, and goes on by itself.
    """

    def __init__(self, switch: EndSwitch) -> None:
        self._switch = switch

    def read(self, offset: int) -> int:
        """Return which events are understood."""
        return _PANICKED | _CRASH_LOADED if offset == 0 else 0

    def write(self, offset: int, value: int) -> None:
        """End the machine at a panic."""
        if offset == 0 and value & _PANICKED:
            self._switch.press(GuestEnd.PANIC)
