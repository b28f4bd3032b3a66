"""A 16550A serial port, as far as a console needs: TI PC16550D data sheet, section 8.

The transmitter is always ready. Where an interrupt line is connected it is pulled, as an edge, when a reason for an
interrupt appears: a byte to read, or the transmitter empty again; where none is, drivers must poll the line status, for
input too. A modem is always there (carrier, ready, clear to send). What is typed waits outside and comes in one byte at
a time as the guest reads, so that there is no overrun; in loopback mode it goes on waiting.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from kvmd.devices.console import ConsoleOutput
from kvmd.devices.console_input import ConsoleInput

COM1 = 0x3F8
"""The first port of the PC's first serial port."""

PORT_COUNT = 8

DATA, INTERRUPT_ENABLE, FIFO_CONTROL, LINE_CONTROL, MODEM_CONTROL, LINE_STATUS, MODEM_STATUS, SCRATCH = range(8)
"""Offsets. ``FIFO_CONTROL`` reads as the interrupt identification; with ``DIVISOR_LATCH`` set in the line
control, offsets 0 and 1 are the divisor."""

DIVISOR_LATCH = 0x80
LOOPBACK = 0x10
DATA_READY = 0x01
TRANSMITTER_EMPTY = 0x60
"""THRE and TEMT: the holding register and the shift register are both empty."""

_MODEM_PRESENT = 0xB0
_NO_INTERRUPT = 0x01
_TRANSMITTER_INTERRUPT = 0x02
_RECEIVER_INTERRUPT = 0x04
_ENABLE_RECEIVER = 0x01
_ENABLE_TRANSMITTER = 0x02
_OUT2 = 0x08
"""Of the modem control: on a PC this output connects the interrupt line."""

_FIFOS_ENABLED = 0xC0


def _unconnected() -> None:
    """Pull no line."""


class Uart16550:
    """The register file; any vCPU thread may call it.

    One lock makes each access to the registers whole. It is not held while a byte goes to the console, which
    may block: another vCPU can always read the line status.

    Args:
        output: what the guest prints.
        typed: what the guest reads; nothing by default.
        interrupt: pulls the interrupt line, from any thread; not connected by default.
    """

    def __init__(
        self,
        output: ConsoleOutput,
        typed: ConsoleInput | None = None,
        interrupt: Callable[[], None] = _unconnected,
    ) -> None:
        self._output = output
        self._input = typed if typed is not None else ConsoleInput()
        self._lock = threading.Lock()
        self._divisor = [0x0C, 0x00]  # 9600 baud: what firmware would leave
        self._interrupt_enable = 0
        self._fifos = False
        self._line_control = 0x03  # 8 bits, no parity, one stop bit
        self._modem_control = 0
        self._scratch = 0
        self._received: int | None = None
        self._interrupt = interrupt
        self._transmitter_emptied = False
        if interrupt is not _unconnected:
            self._input.set_arrived(self._on_arrival)

    def read(self, offset: int) -> int:  # noqa: PLR0911 - one case a register
        """Return the register at ``offset``, 0 to 7.

        Raises:
            ValueError: there is no such register.
        """
        with self._lock:
            match offset:
                case 0 | 1 if self._line_control & DIVISOR_LATCH:
                    return self._divisor[offset]
                case 0:
                    return self._receive()
                case 1:
                    return self._interrupt_enable
                case 2:
                    return self._identify() | (_FIFOS_ENABLED if self._fifos else 0)
                case 3:
                    return self._line_control
                case 4:
                    return self._modem_control
                case 5:
                    return TRANSMITTER_EMPTY | (DATA_READY if self._has_received() else 0)
                case 6:
                    return self._modem_status()
                case 7:
                    return self._scratch
                case _:
                    raise ValueError(f"a 16550 has no register {offset}")

    def write(self, offset: int, value: int) -> None:  # noqa: C901, PLR0912 - one case a register
        """Write the byte ``value`` to the register at ``offset``, 0 to 7; blocks while the console is full.

        Raises:
            ValueError: there is no such register.
        """
        prints = False
        interrupts = False
        with self._lock:
            match offset:
                case 0 | 1 if self._line_control & DIVISOR_LATCH:
                    self._divisor[offset] = value
                case 0 if self._modem_control & LOOPBACK:
                    self._received = value
                case 0:
                    prints = True
                    # Empty again at once, as far as the guest can see.
                    self._transmitter_emptied = True
                    interrupts = bool(self._interrupt_enable & _ENABLE_TRANSMITTER)
                case 1:
                    # To enable the transmitter's interrupt while it is empty raises it (data sheet, 8.6.1.2).
                    if value & ~self._interrupt_enable & _ENABLE_TRANSMITTER:
                        self._transmitter_emptied = True
                    interrupts = bool(value & ~self._interrupt_enable)
                    self._interrupt_enable = value & 0x0F
                case 2:
                    self._fifos = bool(value & 0x01)
                    if value & 0x02:
                        self._received = None
                case 3:
                    self._line_control = value
                case 4:
                    interrupts = bool(value & ~self._modem_control & _OUT2)
                    self._modem_control = value & 0x1F
                case 5 | 6:
                    pass  # read-only
                case 7:
                    self._scratch = value
                case _:
                    raise ValueError(f"a 16550 has no register {offset}")
            interrupts = interrupts and self._wants_interrupt()
        if prints:
            self._output.put(value)
        if interrupts:
            self._interrupt()

    def _on_arrival(self) -> None:
        with self._lock:
            interrupts = self._wants_interrupt()
        if interrupts:
            self._interrupt()

    def _pending(self) -> int:
        """Return the interrupt identification as it is, the most urgent reason first (data sheet, table IV)."""
        if self._interrupt is _unconnected:
            return _NO_INTERRUPT
        if self._interrupt_enable & _ENABLE_RECEIVER and self._has_received():
            return _RECEIVER_INTERRUPT
        if self._interrupt_enable & _ENABLE_TRANSMITTER and self._transmitter_emptied:
            return _TRANSMITTER_INTERRUPT
        return _NO_INTERRUPT

    def _identify(self) -> int:
        """Return the same for the guest, which thereby takes note of an empty transmitter."""
        pending = self._pending()
        if pending == _TRANSMITTER_INTERRUPT:
            self._transmitter_emptied = False
        return pending

    def _wants_interrupt(self) -> bool:
        connected = bool(self._modem_control & _OUT2) and not self._modem_control & LOOPBACK
        return connected and self._pending() != _NO_INTERRUPT

    def _receive(self) -> int:
        """Return the byte that was looped back, or typed; 0 where there is none."""
        received, self._received = self._received, None
        if received is None and not self._modem_control & LOOPBACK:
            received = self._input.take()
        return received or 0

    def _has_received(self) -> bool:
        return self._received is not None or (self._input.waiting and not self._modem_control & LOOPBACK)

    def _modem_status(self) -> int:
        """Return the modem's lines; in loopback, the ones that the modem control drives."""
        if not self._modem_control & LOOPBACK:
            return _MODEM_PRESENT
        dtr, rts, out1, out2 = (self._modem_control >> bit & 1 for bit in range(4))
        return rts << 4 | dtr << 5 | out1 << 6 | out2 << 7
