"""The serial port's interrupts, as Linux's 8250 driver uses them."""

from __future__ import annotations

from kvmd.devices.console import TAIL_BYTES, ConsoleOutput
from kvmd.devices.console_input import ConsoleInput
from kvmd.devices.interrupt import InterruptLine
from kvmd.devices.uart16550 import (
    DATA,
    FIFO_CONTROL,
    INTERRUPT_ENABLE,
    LOOPBACK,
    MODEM_CONTROL,
    Uart16550,
)

RECEIVER, TRANSMITTER = 1, 2
OUT2 = 8
NONE, EMPTY, DATA_THERE = 1, 2, 4


class Rig:
    def __init__(self) -> None:
        self.pulls = 0
        self.typed = ConsoleInput()
        self.output = ConsoleOutput()
        self.uart = Uart16550(self.output, self.typed, self._pull)
        self.uart.write(MODEM_CONTROL, OUT2)

    def _pull(self) -> None:
        self.pulls += 1

    @property
    def reason(self) -> int:
        return self.uart.read(FIFO_CONTROL) & 0xF


def test_what_is_typed_interrupts_once_until_it_is_read() -> None:
    rig = Rig()
    rig.uart.write(INTERRUPT_ENABLE, RECEIVER)
    assert rig.pulls == 0
    rig.typed.offer(b"ab")
    assert rig.pulls == 1
    assert rig.reason == DATA_THERE
    assert [rig.uart.read(DATA), rig.reason, rig.uart.read(DATA), rig.reason] == [ord("a"), DATA_THERE, ord("b"), NONE]
    rig.typed.offer(b"")
    assert rig.pulls == 1


def test_what_was_typed_before_interrupts_when_it_is_asked_for() -> None:
    rig = Rig()
    rig.typed.offer(b"a")
    assert rig.pulls == 0
    rig.uart.write(INTERRUPT_ENABLE, RECEIVER)
    assert rig.pulls == 1


def test_an_empty_transmitter_interrupts_when_enabled_and_after_each_byte() -> None:
    rig = Rig()
    rig.uart.write(INTERRUPT_ENABLE, TRANSMITTER)
    assert (rig.pulls, rig.reason, rig.reason) == (1, EMPTY, NONE)  # reading it is taking note
    rig.uart.write(DATA, ord("x"))
    assert (rig.pulls, rig.reason) == (2, EMPTY)
    assert rig.output.take() == b"x"
    rig.uart.write(INTERRUPT_ENABLE, 0)
    rig.uart.write(DATA, ord("y"))
    assert (rig.pulls, rig.reason) == (2, NONE)
    # What the driver's test for broken chips wants to see: enabled again, it is there again.
    rig.uart.write(INTERRUPT_ENABLE, TRANSMITTER)
    assert (rig.pulls, rig.reason) == (3, EMPTY)


def test_data_comes_before_an_empty_transmitter() -> None:
    rig = Rig()
    rig.uart.write(INTERRUPT_ENABLE, RECEIVER | TRANSMITTER)
    rig.typed.offer(b"a")
    assert rig.reason == DATA_THERE
    rig.uart.read(DATA)
    assert rig.reason == EMPTY


def test_out2_connects_the_line_and_loopback_cuts_it() -> None:
    rig = Rig()
    rig.uart.write(MODEM_CONTROL, 0)
    rig.uart.write(INTERRUPT_ENABLE, RECEIVER)
    rig.typed.offer(b"a")
    assert rig.pulls == 0
    rig.uart.write(MODEM_CONTROL, OUT2 | LOOPBACK)
    assert rig.pulls == 0
    rig.uart.write(MODEM_CONTROL, 0)
    rig.uart.write(MODEM_CONTROL, OUT2)
    assert rig.pulls == 1


def test_a_line_counts_pulls_in_an_eventfd_and_is_closed_once() -> None:
    import os  # noqa: PLC0415 - this test alone

    line = InterruptLine()
    line.pull()
    line.pull()
    assert os.eventfd_read(line.fileno()) == 2
    line.close()
    line.close()
    line.pull()


def test_the_console_s_tail_outlives_what_was_taken() -> None:
    output = ConsoleOutput()
    for byte in b"x" * TAIL_BYTES + b"first":
        output.put(byte)
    output.take()
    for byte in b" last":
        output.put(byte)
    assert output.tail().endswith(b"xxfirst last")
    assert len(output.tail()) == TAIL_BYTES
