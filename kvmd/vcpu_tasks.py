"""The vCPUs: one worker thread each, blocked in KVM_RUN, and the trio task that looks after it.

A thread serves port I/O and MMIO itself, hands memory faults and explicit requests to the conversion service, blocks
for the answer, and enters the guest again. It never touches trio: the service's inbox and the gate are its two doors.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

import structlog
import trio

from kvmd.conversion.hypercall import KVM_HC_MAP_GPA_RANGE, explicit_request
from kvmd.conversion.livelock import LivelockWatch
from kvmd.conversion.messages import Answer, Cause, ConversionRequest, GuestResult, MmioAccess, Outcome
from kvmd.conversion_service import ConversionService, Waiter
from kvmd.devices.mmio import MmioCounter
from kvmd.devices.ports import PortBus
from kvmd.errors import BackendError
from kvmd.hv.exits import (
    BadMemoryFault,
    EmulationFailure,
    Exit,
    FaultDefect,
    Halted,
    Hypercall,
    Interrupted,
    MemoryFault,
    Mmio,
    PortIo,
    Shutdown,
    SystemEvent,
    UnexpectedExit,
)
from kvmd.hv.vcpu import Registers, Vcpu
from kvmd.protection.base import Protection
from kvmd.ranges import PageState
from kvmd.run_gate import RunGate
from kvmd.stop import RESERVED_STATUSES, Stop, StopReason
from kvmd.units import PAGE_SIZE, page_floor

EXIT_PORT = 0xF4
"""OUT of a byte here ends the vCPU with that exit status."""

CONVERSION_PORT = 0xC2
"""OUT of KVM_HC_MAP_GPA_RANGE here asks for an explicit conversion, where the guest cannot make a hypercall."""

_FETCH_RETRIES = 6
"""How often a failed fetch is tried again while memslots change, before it counts as the guest's own failure."""


_DEFECT_TEXT = {
    FaultDefect.UNKNOWN_FLAGS: "memory fault with flags that this kvmd does not know",
    FaultDefect.POISONED: "the host's memory behind this page is broken (EHWPOISON)",
    FaultDefect.NO_INFORMATION: "memory fault without information: no host memory behind a mapped page",
    FaultDefect.OUT_OF_MEMORY: "the host has no memory for this page",
}

STOP_DEADLINE_SECONDS = 10.0
"""How long vCPU threads may take to end before they are given up: some kernels spin in KVM_RUN for ever."""

_log: structlog.stdlib.BoundLogger = structlog.get_logger("kvmd.vcpu_tasks")


class _Next(enum.Enum):
    """What the thread does after an exit, where it does not end."""

    ENTER = "enter"
    """Enter the guest again."""
    COMPLETE = "complete"
    """The same, but the exit is finished only by that entry: a pause has to wait for it."""


@dataclass(frozen=True, slots=True)
class VcpuEnded:
    """The guest ended this vCPU.

    Attributes:
        status: its exit status, 0 to 255.
    """

    status: int


VcpuResult = VcpuEnded | Stop | None
"""How a vCPU's thread ended: by the guest, with the machine's end, or (None) because it was told to."""


@dataclass(frozen=True, slots=True)
class VcpuSurroundings:
    """What all vCPUs of a machine share."""

    gate: RunGate
    service: ConversionService
    protection: Protection
    ports: PortBus
    mmio: MmioCounter


class VcpuThread:
    """What one vCPU's worker thread does.

    Args:
        vcpu: the handle; used by no other thread but to kick it.
        around: what it shares with the others.
    """

    def __init__(self, vcpu: Vcpu, around: VcpuSurroundings) -> None:
        self._vcpu = vcpu
        self._gate = around.gate
        self._service = around.service
        self._protection = around.protection
        self._ports = around.ports
        self._mmio = around.mmio
        self._seat = around.gate.join(vcpu)
        self._waiter = Waiter()
        self._watch: LivelockWatch[Registers] = LivelockWatch(vcpu.registers)
        self._entered_at = 0
        self._fetch_retries = 0

    def main(self) -> VcpuResult:
        """Run the vCPU until it ends. The body of the worker thread."""
        vcpu = self._vcpu
        vcpu.prepare_thread()
        try:
            return self._loop()
        except BackendError as error:
            return self._stop(StopReason.BACKEND_FAILED, str(error))
        finally:
            self._gate.leave(self._seat)
            vcpu.release_thread()

    def _loop(self) -> VcpuResult:
        gate, seat, vcpu, service = self._gate, self._seat, self._vcpu, self._service
        completing = False
        while True:
            # Inside first, then the look at the gate: see kvmd.run_gate for the order.
            seat.inside = True
            if gate.hold:
                seat.inside = False
                gate.went_out()
                if gate.stopping:
                    return None
                if not gate.wait(seat, completing=completing):
                    continue
                # KVM finishes the I/O first, and then leaves before the guest goes on (immediate_exit).
                vcpu.request_exit()
            self._entered_at = service.sequence
            exit_ = vcpu.run()
            seat.inside = False
            if gate.hold:
                gate.went_out()
            outcome = self._handle(exit_)
            if not isinstance(outcome, _Next):
                return outcome
            completing = outcome is _Next.COMPLETE

    # -- exits ---------------------------------------------------------------------------------------------------------

    def _handle(self, exit_: Exit) -> _Next | VcpuResult:
        """Answer one exit. The most frequent ones come first."""
        match exit_:
            case MemoryFault():
                return self._on_fault(exit_)
            case Interrupted():
                self._vcpu.clear_exit_request()
                return _Next.ENTER
            case _:
                self._watch.progress()
                if not isinstance(exit_, EmulationFailure):
                    self._fetch_retries = 0
        match exit_:
            case PortIo():
                return self._on_port(exit_)
            case Mmio():
                return self._on_mmio(exit_)
            case Hypercall():
                return self._on_hypercall(exit_)
            case BadMemoryFault():
                return self._on_bad_fault(exit_)
            case EmulationFailure():
                return self._on_emulation_failure(exit_)
            case Shutdown():
                return self._stop(
                    StopReason.TRIPLE_FAULT,
                    "triple fault: an exception that the guest has no handler for (payload guests have none at all)",
                )
            case Halted():
                return self._stop(StopReason.HALTED, "halted for good: HLT with nothing that could interrupt it")
            case SystemEvent():
                return self._stop(StopReason.SYSTEM_EVENT, f"KVM system event {exit_.event}")
            case UnexpectedExit():
                return self._stop(StopReason.UNEXPECTED_EXIT, f"{exit_.name}: {exit_.detail}")

    def _on_fault(self, fault: MemoryFault) -> _Next | Stop:
        gpa, to = self._protection.wanted(fault)
        answer = self._implicit(gpa, fault.size, to)
        if answer.stop is not None:
            return self._with_registers(answer.stop)
        if self._watch.fault():
            return self._stop(
                StopReason.NO_PROGRESS,
                f"one instruction faults again and again without completing, last for gpa {gpa:#x} to {to.value}: it "
                "needs the private and the shared view of a page at the same time",
            )
        return _Next.ENTER

    def _on_mmio(self, exit_: Mmio) -> _Next | Stop:
        """An access that KVM emulates: to a view that is not live, to a hole in mid-change, or to no memory at all."""
        located = self._protection.locate(exit_.gpa)
        if located is None:
            self._mmio.count(exit_.gpa)
            if not exit_.is_write:
                self._vcpu.complete_read(b"\xff" * exit_.size)
            return _Next.COMPLETE
        # KVM splits an access at pages, so this one lies within one.
        gpa, state = located
        access = MmioAccess(gpa, exit_.size, exit_.data if exit_.is_write else None)
        answer = self._implicit(gpa, exit_.size, state, access)
        if answer.stop is not None:
            return self._with_registers(answer.stop)
        if not exit_.is_write:
            self._vcpu.complete_read(answer.data)
        return _Next.COMPLETE

    def _on_port(self, exit_: PortIo) -> _Next | VcpuResult:
        if exit_.is_write:
            if exit_.port == EXIT_PORT and exit_.size == 1:
                return self._on_exit(exit_.data[-1])
            if exit_.port == CONVERSION_PORT and exit_.size == 1 and exit_.data[-1] == KVM_HC_MAP_GPA_RANGE:
                return self._on_conversion_port()
            for start in range(0, len(exit_.data), exit_.size):
                self._ports.write(exit_.port, exit_.data[start : start + exit_.size])
        else:
            self._vcpu.complete_read(b"".join(self._ports.read(exit_.port, exit_.size) for _ in range(exit_.count)))
        return _Next.COMPLETE

    def _on_exit(self, status: int) -> VcpuResult:
        if status in RESERVED_STATUSES:
            return self._stop(
                StopReason.RESERVED_STATUS,
                f"the guest asked for exit status {status}: {RESERVED_STATUSES.start} to {RESERVED_STATUSES.stop - 1} "
                "are kvmd's own",
            )
        return VcpuEnded(status)

    def _on_conversion_port(self) -> _Next | Stop:
        registers = self._vcpu.registers()
        answer = self._explicit((registers.rbx, registers.rcx, registers.rdx))
        if answer.stop is not None:
            return self._with_registers(answer.stop)
        self._vcpu.set_registers(replace(registers, rax=answer.result))
        return _Next.COMPLETE

    def _on_hypercall(self, exit_: Hypercall) -> _Next | Stop:
        result = GuestResult.EINVAL
        if exit_.number == KVM_HC_MAP_GPA_RANGE:
            answer = self._explicit(exit_.arguments)
            if answer.stop is not None:
                return self._with_registers(answer.stop)
            result = answer.result
        self._vcpu.complete_hypercall(result)
        return _Next.COMPLETE

    def _on_bad_fault(self, fault: BadMemoryFault) -> Stop:
        where = " ".join(
            f"{name} {value:#x}"
            for name, value in (("gpa", fault.gpa), ("size", fault.size), ("flags", fault.flags))
            if value is not None
        )
        name = os.strerror(fault.errno) if fault.errno else "none"
        return self._stop(
            StopReason(fault.defect.value),
            f"{_DEFECT_TEXT[fault.defect]}: {where or 'no address was given'}, error {name}",
        )

    def _on_emulation_failure(self, failure: EmulationFailure) -> _Next | Stop:
        """KVM cannot emulate, which at a page whose view is not live, or away in mid-change, only means: not yet."""
        registers = self._vcpu.registers()
        reported = self._vcpu.translate(registers.rip)
        where = f"instruction at {registers.rip:#x}" + (
            f" ({failure.instruction.hex(' ')})" if failure.instruction else ""
        )
        located = self._protection.locate(reported) if reported is not None else None
        if reported is not None and located is None:
            return self._stop(
                StopReason.FETCH_OUTSIDE_MEMORY, f"instruction fetch outside memory: {where}, gpa {reported:#x}"
            )
        if located is not None and self._fetch_retries < _FETCH_RETRIES:
            gpa, state = located
            answer = self._implicit(page_floor(gpa), PAGE_SIZE, state)
            if answer.stop is not None:
                return self._with_registers(answer.stop)
            if answer.outcome is Outcome.CONVERTED or self._service.sequence != self._entered_at:
                self._fetch_retries += 1
                return _Next.ENTER
        return self._stop(StopReason.EMULATION_FAILURE, f"KVM cannot emulate the {where}")

    # -- requests ------------------------------------------------------------------------------------------------------

    def _implicit(self, gpa: int, size: int, to: PageState, access: MmioAccess | None = None) -> Answer:
        request = ConversionRequest(
            vcpu=self._vcpu.index,
            cause=Cause.IMPLICIT,
            gpa=gpa,
            size_bytes=size,
            to=to,
            entered_at=self._entered_at,
            access=access,
        )
        return self._service.request(request, self._waiter)

    def _explicit(self, arguments: tuple[int, int, int]) -> Answer:
        return self._service.request(explicit_request(self._vcpu.index, arguments, self._entered_at), self._waiter)

    # -- the end -------------------------------------------------------------------------------------------------------

    def _stop(self, reason: StopReason, message: str) -> Stop:
        return self._with_registers(Stop.because(reason, message))

    def _with_registers(self, stop: Stop) -> Stop:
        """Say which vCPU it was, and what its registers are, where they can still be read."""
        registers = None
        with suppress(BackendError):
            registers = self._vcpu.registers()
        return replace(stop, vcpu=self._vcpu.index, registers=registers)


class VcpuTasks:
    """Runs all vCPUs of a machine until the last has ended, or the first stops the machine.

    Args:
        vcpus: the handles.
        around: what they share.
        on_stopping: called on the event loop's thread once the vCPUs are being stopped: lets go whatever a vCPU thread
            may be blocked in.
    """

    def __init__(self, vcpus: list[Vcpu], around: VcpuSurroundings, on_stopping: Callable[[Stop], None]) -> None:
        self._threads = [VcpuThread(vcpu, around) for vcpu in vcpus]
        self._gate = around.gate
        self._on_stopping = on_stopping
        self._stop: Stop | None = None
        self._ended = trio.Event()
        self._all_out = trio.Event()
        self._running = len(self._threads)
        self._status = 0
        # trio's own limiter allows 40 threads and serves other work too; a vCPU blocks its thread for good.
        self._limiter = trio.CapacityLimiter(len(self._threads))
        self.abandoned = False
        """True where a thread had to be given up: what it uses must not be freed."""

    def stop(self, stop: Stop) -> None:
        """Stop the machine; the first call counts. On the event loop's thread."""
        if self._stop is None:
            self._stop = stop
            self._ended.set()

    async def run(self) -> Stop:
        """Run until the machine's end and say why. Cancelling it stops the vCPUs first."""
        async with trio.open_nursery() as nursery:
            scopes = []
            for thread in self._threads:
                scope = trio.CancelScope(shield=True)
                scopes.append(scope)
                nursery.start_soon(self._run_one, thread, scope)
            try:
                await self._ended.wait()
            finally:
                self._gate.stop()
                self._on_stopping(self._stop or Stop.because(StopReason.OPERATOR, "cancelled"))
                with trio.move_on_after(STOP_DEADLINE_SECONDS, shield=True):
                    await self._all_out.wait()
                if not self._all_out.is_set():
                    self.abandoned = True
                    for scope in scopes:
                        scope.cancel()
        if self.abandoned:
            return Stop.because(
                StopReason.VCPU_STUCK,
                f"{self._running} vCPU threads did not leave KVM_RUN within {STOP_DEADLINE_SECONDS:.0f} s of a kick, "
                f"after: {self._stop.message if self._stop else 'a cancelled run'}",
            )
        return self._stop or Stop(StopReason.GUEST_EXIT, "all vCPUs ended", self._status)

    async def _run_one(self, thread: VcpuThread, scope: trio.CancelScope) -> None:
        try:
            with scope:
                result = await trio.to_thread.run_sync(thread.main, abandon_on_cancel=True, limiter=self._limiter)
                self._note_result(result)
        except Exception as error:  # noqa: BLE001 - a bug in one vCPU's thread must end its machine, not the process
            _log.exception("vcpu-thread-failed")
            self.stop(Stop.because(StopReason.BUG, f"a bug of kvmd's in a vCPU thread: {error!r}"))
        self._running -= not scope.cancelled_caught
        if self._running == 0:
            self._ended.set()
            self._all_out.set()

    def _note_result(self, result: VcpuResult) -> None:
        match result:
            case VcpuEnded():
                self._status = max(self._status, result.status)
            case Stop():
                self.stop(result)
            case None:
                pass
