"""The handle of one vCPU, whichever accelerator runs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from kvmd.hv.exits import Exit


@dataclass(frozen=True, slots=True)
class Registers:
    """General-purpose registers, instruction pointer and flags: unsigned 64-bit values."""

    rax: int = 0
    rbx: int = 0
    rcx: int = 0
    rdx: int = 0
    rsi: int = 0
    rdi: int = 0
    rsp: int = 0
    rbp: int = 0
    r8: int = 0
    r9: int = 0
    r10: int = 0
    r11: int = 0
    r12: int = 0
    r13: int = 0
    r14: int = 0
    r15: int = 0
    rip: int = 0
    rflags: int = 0x2


class Vcpu(Protocol):
    """One vCPU. All methods but ``request_exit`` belong to the thread that runs it."""

    @property
    def index(self) -> int:
        """The vCPU's number, from 0."""

    def prepare_thread(self) -> None:
        """Make the calling thread the one that runs this vCPU, before its first ``run``."""

    def release_thread(self) -> None:
        """Undo ``prepare_thread``, in the same thread, before it ends."""

    def run(self) -> Exit:
        """Enter the guest, block until it leaves, and say why. Releases the GIL meanwhile.

        A pending read or hypercall is completed first, even when an exit was requested.

        Raises:
            BackendError: the accelerator failed in a way that is no exit of the guest.
        """

    def request_exit(self) -> None:
        """Make the current or the next ``run`` return ``Interrupted``. From any thread; never blocks."""

    def clear_exit_request(self) -> None:
        """Forget exit requests up to now: called after ``run``, before looking at commands."""

    def complete_read(self, data: bytes) -> None:
        """Give the data that the pending ``PortIo`` or ``Mmio`` load reads, at the next ``run``."""

    def complete_hypercall(self, result: int) -> None:
        """Give the result of the pending ``Hypercall``: 0, 22 (EINVAL) or 11 (EAGAIN)."""

    def set_long_mode(self, *, cr3: int, cpl: int) -> None:
        """Put the vCPU into 64-bit mode on the page tables at ``cr3`` (C-bit included).

        Flat segments of privilege level ``cpl`` (0 or 3), CR0.PG, CR4.PAE and CR4.OSFXSR set, no interrupt or
        descriptor tables: any exception is a triple fault.
        """

    def registers(self) -> Registers:
        """Read the registers."""

    def set_registers(self, registers: Registers) -> None:
        """Write the registers."""

    def translate(self, address: int) -> int | None:
        """Return the gpa, C-bit included, that the guest's page tables map ``address`` to; None if they do not."""

    def close(self) -> None:
        """Give up the vCPU; harmless the second time."""
