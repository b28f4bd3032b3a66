"""What is done about each exit of a vCPU, in that vCPU's thread.

Port I/O and MMIO are served here and now; memory faults and explicit requests go to the conversion service.
"""

from __future__ import annotations

import enum
import os
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Final, Protocol

from kvmd.bell import Bell
from kvmd.conversion.hypercall import KVM_HC_MAP_GPA_RANGE, explicit_request
from kvmd.conversion.livelock import LivelockWatch
from kvmd.conversion.messages import CONVERTED, IMPLICIT, Answer, ConversionRequest, GuestResult, MmioAccess
from kvmd.conversion.rate_limit import RateLimit
from kvmd.devices.mmio import MmioBus, MmioCounter
from kvmd.devices.ports import PortBus
from kvmd.devices.power import EndSwitch, GuestEnd
from kvmd.errors import BackendError
from kvmd.hv.exits import (
    BadMemoryFault,
    EmulationFailure,
    Exit,
    FaultDefect,
    Hypercall,
    Interrupted,
    MemoryFault,
    Mmio,
    PortIo,
)
from kvmd.hv.vcpu import Registers, Vcpu
from kvmd.last_words import FatalExit, last_words
from kvmd.protection.base import Protection
from kvmd.ranges import GpaRange, PageState
from kvmd.service_place import ServicePlace
from kvmd.stop import RESERVED_STATUSES, Stop, StopReason
from kvmd.units import PAGE_SIZE, page_ceil, page_floor

EXIT_PORT = 0xF4
"""OUT of a byte here ends the vCPU with that exit status."""

CONVERSION_PORT = 0xC2
"""OUT of KVM_HC_MAP_GPA_RANGE here asks for an explicit conversion, where the guest cannot make a hypercall."""

_FETCH_RETRIES = 6
"""How often a failed fetch is tried again while memslots change, before it counts as the guest's own failure."""

_ENDS = {
    GuestEnd.POWER_OFF: (StopReason.GUEST_POWER_OFF, "the guest powered off"),
    GuestEnd.REBOOT: (StopReason.GUEST_REBOOT, "the guest rebooted, which ends its machine: start it again"),
    GuestEnd.PANIC: (StopReason.GUEST_PANIC, "the guest's kernel panicked"),
}

_DEFECT_TEXT = {
    FaultDefect.UNKNOWN_FLAGS: "memory fault with flags that this kvmd does not know",
    FaultDefect.POISONED: "the host's memory behind this page is broken (EHWPOISON)",
    FaultDefect.NO_INFORMATION: "memory fault without information: no host memory behind a mapped page",
    FaultDefect.OUT_OF_MEMORY: "the host has no memory for this page",
}


class Next(enum.Enum):
    """What the thread does after an exit, where it does not end."""

    ENTER = "enter"
    """Enter the guest again."""
    COMPLETE = "complete"
    """The same, but the exit is finished only by that entry: a pause has to wait for it."""


_ENTER: Final = Next.ENTER  # see kvmd.ranges.PRIVATE


@dataclass(frozen=True, slots=True)
class VcpuEnded:
    """The guest ended this vCPU.

    Attributes:
        status: its exit status, 0 to 255.
    """

    status: int


VcpuResult = VcpuEnded | Stop | None
"""How a vCPU's thread ended: by the guest, with the machine's end, or (None) because it was told to."""


class Converter(Protocol):
    """The conversion service, as a vCPU thread sees it."""

    @property
    def sequence(self) -> int:
        """The number of changes so far."""

    def request(self, request: ConversionRequest, bell: Bell) -> Answer:
        """Hand over a request and block until it is answered."""


@dataclass(frozen=True, slots=True)
class VcpuSurroundings:
    """What all vCPUs of a machine share.

    Attributes:
        service: makes conversions.
        protection: knows the views.
        ports: answers port I/O.
        mmio: counts accesses that nothing answers.
        devices: answers MMIO; none in a payload's machine.
        switch: notes how the guest ends its machine. Where there is one, a Linux guest's, the payload's own ports mean
            nothing.
        rate: how fast the machine may convert; None where there is no limit.
        place: the conversion service's, which a vCPU's thread may be taken to.
    """

    service: Converter
    protection: Protection
    ports: PortBus
    mmio: MmioCounter
    devices: MmioBus | None = None
    switch: EndSwitch | None = None
    rate: RateLimit | None = None
    place: ServicePlace = field(default_factory=ServicePlace)


class ExitHandler:
    """Answers the exits of one vCPU, and asks the conversion service on its behalf.

    Args:
        vcpu: the handle; its thread is the caller's.
        around: what it shares with the other vCPUs.
        bell: what its thread waits at for answers; closed by the caller.

    Attributes:
        due_ns: the time, on the monotonic clock, before which the vCPU is not to enter the guest; 0 for now.
    """

    def __init__(self, vcpu: Vcpu, around: VcpuSurroundings, bell: Bell) -> None:
        self._vcpu = vcpu
        self._index = vcpu.index
        self._service = around.service
        self._protection = around.protection
        self._ports = around.ports
        self._mmio = around.mmio
        self._devices = around.devices
        self._switch = around.switch
        self._rate = around.rate
        self._bell = bell
        self.due_ns = 0
        self._watch: LivelockWatch[Registers] = LivelockWatch(vcpu.registers)
        self._entered_at = 0
        self._fetch_retries = 0

    # -- exits ---------------------------------------------------------------------------------------------------------

    def answer(self, exit_: Exit, entered_at: int) -> Next | VcpuResult:
        """Answer one exit: what the thread does next, or how it ends.

        Args:
            exit_: why the vCPU left the guest.
            entered_at: the machine's change sequence before it entered.
        """
        self._entered_at = entered_at
        if isinstance(exit_, MemoryFault):
            return self._on_fault(exit_)
        if isinstance(exit_, Interrupted):
            self._vcpu.clear_exit_request()
            return _ENTER
        self._watch.progress()
        if isinstance(exit_, EmulationFailure):
            return self._on_emulation_failure(exit_)
        self._fetch_retries = 0
        return self._answer_rare(exit_)

    def _answer_rare(self, exit_: PortIo | Mmio | Hypercall | BadMemoryFault | FatalExit) -> Next | VcpuResult:
        match exit_:
            case PortIo():
                return self._on_port(exit_)
            case Mmio():
                return self._on_mmio(exit_)
            case Hypercall():
                return self._on_hypercall(exit_)
            case BadMemoryFault():
                return self._on_bad_fault(exit_)
            case _:
                return self._stop(*last_words(exit_))

    def _on_fault(self, fault: MemoryFault) -> Next | Stop:
        gpa, to = self._protection.wanted(fault)
        # By position, which takes half the time; True: what a fault asks for is never malformed.
        request = ConversionRequest(self._index, IMPLICIT, gpa, fault.size, to, self._entered_at, True)  # noqa: FBT003
        # As _ask, without the call that it is: a fault is what a guest waits for most.
        answer = self._service.request(request, self._bell)
        if self._rate is not None:
            self.due_ns = self._rate.due_ns
        if answer.stop is not None:
            return self._with_registers(self._diagnosed(answer.stop, gpa, fault.size, to))
        # A stale or spurious fault only lost a race, which says nothing of its instruction.
        if answer.outcome is CONVERTED and self._watch.fault():
            return self._stop(
                StopReason.NO_PROGRESS,
                f"one instruction faults again and again without completing, last for gpa {gpa:#x} to {to.value}: it "
                "needs the private and the shared view of a page at the same time",
            )
        return _ENTER

    def _on_mmio(self, exit_: Mmio) -> Next | Stop:
        """An access that KVM emulates: to a view that is not live, to a hole in mid-change, or to no memory at all."""
        if self._devices is not None and (found := self._devices.find(exit_.gpa, exit_.size)) is not None:
            device, offset = found
            if exit_.is_write:
                device.write(offset, exit_.data)
            else:
                self._vcpu.complete_read(device.read(offset, exit_.size))
            return Next.COMPLETE
        gpa, state = self._protection.locate(exit_.gpa)
        if state is None:
            self._mmio.count(gpa)
            if not exit_.is_write:
                self._vcpu.complete_read(b"\xff" * exit_.size)
            return Next.COMPLETE
        # KVM splits an access at pages, so this one lies within one.
        access = MmioAccess(gpa, exit_.size, exit_.data if exit_.is_write else None)
        data: bytes | None
        if self._protection.asks_by_address():
            answer = self._implicit(gpa, exit_.size, state, access)
            if answer.stop is not None:
                return self._with_registers(answer.stop)
            data = answer.data
        else:
            # No request: what the page's state was when KVM looked is no wish to have it back.
            data = self._protection.access_in_place(access)
            if data is None:
                return self._stop(
                    StopReason.EMULATION_FAILURE,
                    f"KVM leaves an access to private memory to kvmd, which only the guest can make: gpa {gpa:#x} "
                    f"size {exit_.size:#x}; no memslot is there, or the instruction is one that KVM emulates",
                )
        if not exit_.is_write:
            self._vcpu.complete_read(data)
        return Next.COMPLETE

    def _on_port(self, exit_: PortIo) -> Next | VcpuResult:
        if exit_.is_write:
            if exit_.port == EXIT_PORT and exit_.size == 1 and self._switch is None:
                return self._on_exit(exit_.data[-1])
            if (
                exit_.port == CONVERSION_PORT
                and exit_.size == 1
                and exit_.data[-1] == KVM_HC_MAP_GPA_RANGE
                and self._switch is None
            ):
                return self._on_conversion_port()
            for start in range(0, len(exit_.data), exit_.size):
                self._ports.write(exit_.port, exit_.data[start : start + exit_.size])
            if self._switch is not None and self._switch.wish is not None:
                return self._stop(*_ENDS[self._switch.wish])
        else:
            self._vcpu.complete_read(b"".join(self._ports.read(exit_.port, exit_.size) for _ in range(exit_.count)))
        return Next.COMPLETE

    def _on_exit(self, status: int) -> VcpuResult:
        if status in RESERVED_STATUSES:
            return self._stop(
                StopReason.RESERVED_STATUS,
                f"the guest asked for exit status {status}: {RESERVED_STATUSES.start} to {RESERVED_STATUSES.stop - 1} "
                "are kvmd's own",
            )
        return VcpuEnded(status)

    def _on_conversion_port(self) -> Next | Stop:
        registers = self._vcpu.registers()
        answer = self._explicit((registers.rbx, registers.rcx, registers.rdx))
        if answer.stop is not None:
            return self._with_registers(answer.stop)
        self._vcpu.set_registers(replace(registers, rax=answer.result))
        return Next.COMPLETE

    def _on_hypercall(self, exit_: Hypercall) -> Next | Stop:
        result = GuestResult.EINVAL
        if exit_.number == KVM_HC_MAP_GPA_RANGE:
            answer = self._explicit(exit_.arguments)
            if answer.stop is not None:
                return self._with_registers(answer.stop)
            result = answer.result
        self._vcpu.complete_hypercall(result)
        return Next.COMPLETE

    def _on_bad_fault(self, fault: BadMemoryFault) -> Stop:
        gpa = None if fault.gpa is None else self._protection.locate(fault.gpa)[0]
        where = " ".join(
            f"{name} {value:#x}"
            for name, value in (("gpa", gpa), ("size", fault.size), ("flags", fault.flags))
            if value is not None
        )
        name = os.strerror(fault.errno) if fault.errno else "none"
        return self._stop(
            StopReason(fault.defect.value),
            f"{_DEFECT_TEXT[fault.defect]}: {where or 'no address was given'}, error {name}",
        )

    def _on_emulation_failure(self, failure: EmulationFailure) -> Next | Stop:
        """KVM cannot emulate, which at a page whose view is not live, or away in mid-change, only means: not yet."""
        registers = self._vcpu.registers()
        reported = self._vcpu.translate(registers.rip)
        where = f"instruction at {registers.rip:#x}" + (
            f" ({failure.instruction.hex(' ')})" if failure.instruction else ""
        )
        if reported is not None:
            gpa, state = self._protection.locate(reported)
            if state is None:
                return self._stop(
                    StopReason.FETCH_OUTSIDE_MEMORY, f"instruction fetch outside memory: {where}, gpa {gpa:#x}"
                )
            answer = self._implicit(page_floor(gpa), PAGE_SIZE, state)
            if answer.stop is not None:
                return self._with_registers(answer.stop)
            moved = answer.outcome is CONVERTED or self._service.sequence != self._entered_at
            if moved and self._fetch_retries < _FETCH_RETRIES:
                self._fetch_retries += 1
                return _ENTER
        return self._stop(StopReason.EMULATION_FAILURE, f"KVM cannot emulate the {where}")

    # -- requests ------------------------------------------------------------------------------------------------------

    def _implicit(self, gpa: int, size: int, to: PageState, access: MmioAccess | None = None) -> Answer:
        request = ConversionRequest(self._index, IMPLICIT, gpa, size, to, self._entered_at, access=access)
        return self._ask(request)

    def _explicit(self, arguments: tuple[int, int, int]) -> Answer:
        return self._ask(explicit_request(self._vcpu.index, arguments, self._entered_at))

    def _ask(self, request: ConversionRequest) -> Answer:
        answer = self._service.request(request, self._bell)
        if self._rate is not None:
            self.due_ns = self._rate.due_ns
        return answer

    # -- the end -------------------------------------------------------------------------------------------------------

    def _stop(self, reason: StopReason, message: str) -> Stop:
        return self._with_registers(Stop.because(reason, message))

    def _diagnosed(self, stop: Stop, gpa: int, size: int, state: PageState) -> Stop:
        """Add what the protection knows of memory that is in the right state and still faults."""
        if stop.reason is not StopReason.NO_PROGRESS:
            return stop
        cause = self._protection.diagnose(GpaRange(page_floor(gpa), page_ceil(gpa + size)), state)
        return replace(stop, message=f"{stop.message}: {cause}") if cause else stop

    def _with_registers(self, stop: Stop) -> Stop:
        """Say which vCPU it was, and what its registers are, where they can still be read."""
        registers = None
        with suppress(BackendError):
            registers = self._vcpu.registers()
        return replace(stop, vcpu=self._vcpu.index, registers=registers)
