"""How a Linux guest ends its machine, register by register."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvmd.devices.power import (
    EndSwitch,
    GuestEnd,
    PanicPort,
    ResetRegister,
    SleepRegisters,
    acpi_reset,
    keyboard_reset,
)


def wish_of(switch: EndSwitch) -> GuestEnd | None:
    return switch.wish


def test_only_s5_powers_off() -> None:
    switch = EndSwitch()
    registers = SleepRegisters(switch)
    for value in (0x00, 5 << 2, 1 << 5, 3 << 2 | 1 << 5):
        registers.write(0, value)
    registers.write(1, 5 << 2 | 1 << 5)  # the status register
    assert wish_of(switch) is None
    registers.write(0, 5 << 2 | 1 << 5)
    assert wish_of(switch) is GuestEnd.POWER_OFF
    assert (registers.read(0), registers.read(1)) == (0, 0)


@pytest.mark.parametrize(("make", "value"), [(acpi_reset, 1), (keyboard_reset, 0xFE)])
def test_only_one_value_resets(make: Callable[[EndSwitch], ResetRegister], value: int) -> None:
    switch = EndSwitch()
    register = make(switch)
    register.write(0, value ^ 0x80)
    assert wish_of(switch) is None
    assert register.read(0) == 0
    register.write(0, value)
    assert wish_of(switch) is GuestEnd.REBOOT


def test_a_panic_ends_the_machine_and_a_crash_kernel_does_not() -> None:
    switch = EndSwitch()
    port = PanicPort(switch)
    assert port.read(0) == 3
    port.write(0, 2)
    assert wish_of(switch) is None
    port.write(0, 1)
    assert wish_of(switch) is GuestEnd.PANIC


def test_the_first_wish_counts() -> None:
    switch = EndSwitch()
    switch.press(GuestEnd.PANIC)
    switch.press(GuestEnd.REBOOT)
    assert wish_of(switch) is GuestEnd.PANIC
