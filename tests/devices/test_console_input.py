from __future__ import annotations

import pytest

from kvmd.devices.console import ConsoleOutput
from kvmd.devices.console_input import ConsoleInput
from kvmd.devices.uart16550 import DATA, DATA_READY, LINE_STATUS, LOOPBACK, MODEM_CONTROL, Uart16550


def test_input_is_bounded_and_in_order() -> None:
    typed = ConsoleInput(4)
    woken: list[int] = []
    typed.set_wake(lambda: woken.append(1))
    assert typed.take() is None
    assert typed.offer(b"abcdef") == 4
    assert typed.offer(b"x") == 0
    assert [typed.take() for _ in range(3)] == [97, 98, 99]
    assert woken == []
    assert (typed.take(), typed.waiting) == (100, False)
    assert woken == [1]


def test_input_needs_room() -> None:
    with pytest.raises(ValueError, match="at least one byte"):
        ConsoleInput(0)


def test_the_serial_port_receives_what_is_typed() -> None:
    typed = ConsoleInput()
    uart = Uart16550(ConsoleOutput(), typed)
    assert not uart.read(LINE_STATUS) & DATA_READY
    assert uart.read(DATA) == 0
    typed.offer(b"ab")
    assert uart.read(LINE_STATUS) & DATA_READY
    assert (uart.read(DATA), uart.read(DATA)) == (97, 98)
    assert not uart.read(LINE_STATUS) & DATA_READY


def test_what_is_typed_waits_for_the_end_of_loopback() -> None:
    typed = ConsoleInput()
    uart = Uart16550(ConsoleOutput(), typed)
    uart.write(MODEM_CONTROL, LOOPBACK)
    typed.offer(b"a")
    assert not uart.read(LINE_STATUS) & DATA_READY
    uart.write(DATA, 7)
    assert uart.read(DATA) == 7
    assert uart.read(DATA) == 0
    uart.write(MODEM_CONTROL, 0)
    assert uart.read(DATA) == 97
