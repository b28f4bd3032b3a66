"""The vCPUs: one worker thread each, blocked in KVM_RUN, and the trio task that looks after it.

A thread serves port I/O and MMIO itself, hands memory faults and explicit requests to the conversion service, blocks
for the answer, and enters the guest again. It never touches trio: the service's channel and the gate are its two doors.
"""

from __future__ import annotations

from collections.abc import Callable

import structlog
import trio

from kvmd.bell import Bell
from kvmd.errors import BackendError
from kvmd.exit_handler import ExitHandler, Next, VcpuEnded, VcpuResult, VcpuSurroundings
from kvmd.hv.vcpu import Vcpu
from kvmd.run_gate import RunGate
from kvmd.stop import Stop, StopReason

STOP_DEADLINE_SECONDS = 10.0
"""How long vCPU threads may take to end before they are given up: some kernels spin in KVM_RUN for ever."""

_log: structlog.stdlib.BoundLogger = structlog.get_logger("kvmd.vcpu_tasks")


class VcpuThread:
    """What one vCPU's worker thread does.

    Args:
        vcpu: the handle; used by no other thread but to kick it.
        gate: lets the thread into KVM_RUN, or keeps it out.
        around: what it shares with the others.
    """

    def __init__(self, vcpu: Vcpu, gate: RunGate, around: VcpuSurroundings) -> None:
        self._vcpu = vcpu
        self._gate = gate
        self._around = around
        self._seat = gate.join(vcpu)

    def main(self) -> VcpuResult:
        """Run the vCPU until it ends. The body of the worker thread."""
        vcpu = self._vcpu
        vcpu.prepare_thread()
        try:
            with Bell() as bell, self._around.place.vcpu(vcpu.index):
                return self._loop(ExitHandler(vcpu, self._around, bell))
        except BackendError as error:
            return Stop.because(StopReason.BACKEND_FAILED, str(error), vcpu=vcpu.index)
        finally:
            self._gate.leave(self._seat)
            vcpu.release_thread()

    def _loop(self, handler: ExitHandler) -> VcpuResult:
        gate, seat, vcpu, service, answer = self._gate, self._seat, self._vcpu, self._around.service, handler.answer
        completing, complete = False, Next.COMPLETE
        while True:
            if handler.due_ns and gate.hold_back(handler.due_ns):
                handler.due_ns = 0
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
            entered_at = service.sequence
            exit_ = vcpu.run()
            seat.inside = False
            if gate.hold:
                gate.went_out()
            outcome = answer(exit_, entered_at)
            if not isinstance(outcome, Next):
                return outcome
            completing = outcome is complete


class VcpuTasks:
    """Runs all vCPUs of a machine until the last has ended, or the first stops the machine.

    Args:
        vcpus: the handles.
        gate: theirs alone.
        around: what they share.
        on_stopping: called on the event loop's thread once the vCPUs are being stopped: lets go whatever a vCPU thread
            may be blocked in.
    """

    def __init__(
        self, vcpus: list[Vcpu], gate: RunGate, around: VcpuSurroundings, on_stopping: Callable[[Stop], None]
    ) -> None:
        self._threads = [VcpuThread(vcpu, gate, around) for vcpu in vcpus]
        self._gate = gate
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
