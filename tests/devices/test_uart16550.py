import threading

import pytest

from kvmd.devices import uart16550 as uart
from kvmd.devices.console import ConsoleOutput
from kvmd.devices.uart16550 import Uart16550


@pytest.fixture
def output() -> ConsoleOutput:
    return ConsoleOutput()


@pytest.fixture
def port(output: ConsoleOutput) -> Uart16550:
    return Uart16550(output)


def test_bytes_written_to_the_data_register_are_printed(port: Uart16550, output: ConsoleOutput) -> None:
    for byte in b"hello\n\x00\xff":
        port.write(uart.DATA, byte)
    assert output.take() == b"hello\n\x00\xff"


def test_the_transmitter_is_always_ready(port: Uart16550) -> None:
    assert port.read(uart.LINE_STATUS) == 0x60
    port.write(uart.DATA, 0x41)
    assert port.read(uart.LINE_STATUS) == 0x60


def test_the_divisor_is_behind_the_latch_and_prints_nothing(port: Uart16550, output: ConsoleOutput) -> None:
    port.write(uart.INTERRUPT_ENABLE, 0x05)
    port.write(uart.LINE_CONTROL, 0x83)
    port.write(0, 0x01)
    port.write(1, 0x02)
    assert (port.read(0), port.read(1), port.read(uart.LINE_CONTROL)) == (0x01, 0x02, 0x83)
    port.write(uart.LINE_CONTROL, 0x03)
    assert (port.read(uart.DATA), port.read(uart.INTERRUPT_ENABLE)) == (0x00, 0x05)
    assert output.take() == b""


def test_reserved_bits_of_interrupt_enable_and_modem_control_read_zero(port: Uart16550) -> None:
    port.write(uart.INTERRUPT_ENABLE, 0xFF)
    port.write(uart.MODEM_CONTROL, 0xEF)
    assert port.read(uart.INTERRUPT_ENABLE) == 0x0F
    assert port.read(uart.MODEM_CONTROL) == 0x0F


def test_no_interrupt_is_ever_pending_and_the_fifos_show(port: Uart16550) -> None:
    port.write(uart.INTERRUPT_ENABLE, 0x02)
    assert port.read(uart.FIFO_CONTROL) == 0x01
    port.write(uart.FIFO_CONTROL, 0x01)
    assert port.read(uart.FIFO_CONTROL) == 0xC1
    port.write(uart.FIFO_CONTROL, 0x00)
    assert port.read(uart.FIFO_CONTROL) == 0x01


def test_the_scratch_register_keeps_a_byte(port: Uart16550) -> None:
    port.write(uart.SCRATCH, 0xA5)
    assert port.read(uart.SCRATCH) == 0xA5


def test_status_registers_ignore_writes(port: Uart16550) -> None:
    before = port.read(uart.LINE_STATUS), port.read(uart.MODEM_STATUS)
    port.write(uart.LINE_STATUS, 0)
    port.write(uart.MODEM_STATUS, 0)
    assert (port.read(uart.LINE_STATUS), port.read(uart.MODEM_STATUS)) == before == (0x60, 0xB0)


def test_loopback_passes_the_loopback_probe_of_linux(port: Uart16550, output: ConsoleOutput) -> None:
    port.write(uart.MODEM_CONTROL, 0x1A)  # loopback, OUT2, RTS, as 8250 autoconfig does
    assert port.read(uart.MODEM_STATUS) & 0xF0 == 0x90
    port.write(uart.DATA, 0x42)
    assert port.read(uart.LINE_STATUS) == 0x61
    assert port.read(uart.DATA) == 0x42
    assert port.read(uart.LINE_STATUS) == 0x60
    assert output.take() == b""


def test_resetting_the_receive_fifo_drops_what_was_received(port: Uart16550) -> None:
    port.write(uart.MODEM_CONTROL, uart.LOOPBACK)
    port.write(uart.DATA, 0x42)
    port.write(uart.FIFO_CONTROL, 0x03)
    assert port.read(uart.LINE_STATUS) == 0x60


@pytest.mark.parametrize("offset", [-1, 8])
def test_there_are_eight_registers(port: Uart16550, offset: int) -> None:
    with pytest.raises(ValueError, match="no register"):
        port.read(offset)
    with pytest.raises(ValueError, match="no register"):
        port.write(offset, 0)


def test_the_line_status_can_be_read_while_another_vcpu_waits_for_the_console() -> None:
    output = ConsoleOutput(capacity=1)
    port = Uart16550(output)
    port.write(uart.DATA, 0x41)
    printing = threading.Thread(target=port.write, args=(uart.DATA, 0x42))
    printing.start()
    try:
        assert port.read(uart.LINE_STATUS) == 0x60
        assert output.take()
    finally:
        output.release()
        printing.join(timeout=10)
    assert not printing.is_alive()
