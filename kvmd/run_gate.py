"""When vCPU threads may be inside KVM_RUN: pause, stop, and the moments when all must be out of it.

Plain threads and one lock, no trio: the conversion service holds all vCPUs out of KVM_RUN while it cuts a memslot,
from whichever thread it happens to be in.

The order that makes a kick safe (KVM API, "immediate_exit" in 5. The kvm_run structure): publish the command, then
ask the vCPU to leave. A vCPU thread does the opposite: it says that it is inside, and then looks for commands. So
either it sees the command, or it is kicked.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvmd.errors import BackendError
from kvmd.hv.vcpu import Vcpu

QUIESCE_DEADLINE_SECONDS = 5.0
"""A vCPU that has not left KVM_RUN by then never will: a bug of the host's kernel."""


class VcpuStuck(BackendError):
    """A vCPU does not leave KVM_RUN although it was kicked.

    Attributes:
        vcpu: its index.
    """

    def __init__(self, vcpu: int) -> None:
        super().__init__(f"vCPU {vcpu} did not leave KVM_RUN within {QUIESCE_DEADLINE_SECONDS:.0f} s of a kick")
        self.vcpu = vcpu


class Seat:
    """One vCPU's place at the gate. ``inside`` is written by its thread only."""

    __slots__ = ("inside", "parked", "vcpu")

    def __init__(self, vcpu: Vcpu) -> None:
        self.vcpu = vcpu
        self.inside = False
        self.parked = False


class RunGate:
    """Lets the vCPU threads of one machine into KVM_RUN, and gets them out.

    Args:
        on_parked: called, from a vCPU thread and under the gate's lock, when the last running vCPU has parked for a
            pause; must not block.
    """

    def __init__(self, on_parked: Callable[[], None]) -> None:
        self.hold = False
        """True while a vCPU thread must not enter KVM_RUN without asking ``wait``."""
        self._on_parked = on_parked
        self._changed = threading.Condition()
        self._seats: list[Seat] = []
        self._quiescing = 0
        self._paused = False
        self._stopping = False
        self.held_back_ns = 0
        """How long vCPUs were kept out of the guest by ``hold_back``, all together."""

    # -- the vCPU threads' side ----------------------------------------------------------------------------

    def join(self, vcpu: Vcpu) -> Seat:
        """Give the vCPU a seat, before its thread starts."""
        seat = Seat(vcpu)
        with self._changed:
            self._seats.append(seat)
        return seat

    def leave(self, seat: Seat) -> None:
        """Take the seat back: the vCPU's thread has ended."""
        with self._changed:
            seat.inside = False
            self._seats.remove(seat)
            self._note_parked()
            self._changed.notify_all()

    @property
    def stopping(self) -> bool:
        """True once the machine is to stop: the thread ends instead of entering again."""
        return self._stopping

    def went_out(self) -> None:
        """Tell a waiter that a seat is no longer inside; called only while ``hold`` is set."""
        with self._changed:
            self._changed.notify_all()

    def wait(self, seat: Seat, *, completing: bool) -> bool:
        """Block until the vCPU may enter KVM_RUN, or the machine stops. While paused, the seat is parked.

        Args:
            seat: the caller's.
            completing: the last exit is finished only by the next KVM_RUN, so a pause has to let the vCPU in once more.

        Returns whether the entry is for that alone: the seat is inside already, and the vCPU must leave at once.
        """
        with self._changed:
            while self.hold and not self._stopping:
                if self._paused and not self._quiescing and completing:
                    seat.inside = True
                    return True
                if self._paused and not completing and not seat.parked:
                    seat.parked = True
                    self._note_parked()
                self._changed.wait()
            seat.parked = False
            return False

    def hold_back(self, until_ns: int) -> bool:
        """Keep the caller's vCPU out of the guest until then, on the monotonic clock.

        Returns false where a pause or the machine's end came first: the caller asks again after ``wait``.
        """
        with self._changed:
            started_ns = now_ns = time.monotonic_ns()
            while now_ns < until_ns and not (self._paused or self._stopping):
                self._changed.wait((until_ns - now_ns) / 1e9)
                now_ns = time.monotonic_ns()
            self.held_back_ns += now_ns - started_ns
            return now_ns >= until_ns

    # -- the commanding side -------------------------------------------------------------------------------

    def kick_all(self) -> None:
        """Get all vCPUs out of KVM_RUN once; those that are not inside are left alone."""
        with self._changed:
            self._kick_inside()

    @contextmanager
    def quiesce(self) -> Iterator[None]:
        """Hold all vCPUs out of KVM_RUN. Blocks until they are; from any thread but theirs.

        Raises:
            VcpuStuck: one does not come out.
        """
        with self._changed:
            self._quiescing += 1
            self.hold = True
        try:
            with self._changed:
                self._kick_inside()
                self._await_outside()
            yield
        finally:
            with self._changed:
                self._quiescing -= 1
                self._release()

    def pause(self) -> None:
        """Ask all vCPUs to park; ``on_parked`` follows when they have. Never blocks for long."""
        with self._changed:
            self._paused = True
            self.hold = True
            self._kick_inside()
            self._note_parked()
            self._changed.notify_all()

    def resume(self) -> None:
        """Let the vCPUs in again."""
        with self._changed:
            self._paused = False
            for seat in self._seats:
                seat.parked = False
            self._release()

    def stop(self) -> None:
        """Make all vCPU threads end instead of entering again. Never blocks for long, and lasts."""
        with self._changed:
            self._stopping = True
            self.hold = True
            self._kick_inside()
            self._changed.notify_all()

    def _kick_inside(self) -> None:
        for seat in self._seats:
            if seat.inside:
                seat.vcpu.request_exit()

    def _await_outside(self) -> None:
        deadline = time.monotonic() + QUIESCE_DEADLINE_SECONDS
        # A copy: while this waits, a vCPU may end and take its seat out of the list.
        for seat in tuple(self._seats):
            while seat.inside:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise VcpuStuck(seat.vcpu.index)
                self._changed.wait(left)

    def _note_parked(self) -> None:
        if self._paused and all(seat.parked for seat in self._seats):
            self._on_parked()

    def _release(self) -> None:
        self.hold = self._quiescing > 0 or self._paused or self._stopping
        self._changed.notify_all()
