"""The conversion service: one task a machine that makes all conversions, one after the other.

The rules are in ``kvmd.conversion.rules``; this is the shell that moves messages::

    vCPU thread ──request──> door ──> porter task ──trio channel──> service task
         ^                                                               │ rules, protection
         └─────────── a lock that wakes just this thread <── answer ─────┘
"""

from __future__ import annotations

import math
import threading
import time
from contextlib import suppress

import structlog
import trio

from kvmd.conversion.changes import Change, Failure, FailureKind, Ticket
from kvmd.conversion.messages import Answer, ConversionRequest, GuestResult, Outcome
from kvmd.conversion.record import ConversionRecord
from kvmd.conversion.ring import RecordRing
from kvmd.conversion.rules import ConversionRules
from kvmd.errors import BackendError
from kvmd.protection.base import Protection
from kvmd.ranges import GpaRange
from kvmd.request_door import LINGER_SECONDS, RequestDoor
from kvmd.stop import Stop, StopReason

_log: structlog.stdlib.BoundLogger = structlog.get_logger("kvmd.conversion_service")

INLINE_PAGES = 16
"""A change of more pages is made in a worker thread, so that the event loop goes on meanwhile. Handing one over costs
about as much as converting a page."""

TURN_SECONDS = 0.002
"""The longest that the service keeps the event loop to itself while requests keep coming."""

LEAK_RETRY_SECONDS = 1.0
"""How often memory that could not be discarded is tried again."""


class Pending(Ticket):
    """A request on its way through the service, with its times and the thread that waits for it."""

    __slots__ = ("apply_ns", "arrived_ns", "discard_ns", "started_ns", "waiter")

    def __init__(self, request: ConversionRequest, waiter: Waiter) -> None:
        super().__init__(request)
        self.waiter = waiter
        self.arrived_ns = time.monotonic_ns()
        self.started_ns = 0
        self.apply_ns = 0
        self.discard_ns = 0


class Waiter:
    """What one vCPU thread blocks on: a raw lock, since releasing it wakes exactly that thread."""

    __slots__ = ("_answer", "_lock")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()
        self._answer: Answer | None = None

    def wait(self) -> Answer:
        """Block until answered. The service answers every request, at teardown too."""
        self._lock.acquire()
        answer, self._answer = self._answer, None
        if answer is None:
            raise RuntimeError("woken without an answer")
        return answer

    def answer(self, answer: Answer) -> None:
        """Wake the thread with its answer."""
        self._answer = answer
        self._lock.release()


_ENDED = Stop.because(StopReason.BUG, "the conversion service ended under a running guest")


class ConversionService:
    """Serialises the conversions of one machine.

    Args:
        rules: decide; owned by this service from now on.
        protection: makes changes real.
        memory_lock: held while memory changes hands, and by whoever reads guest memory for the host.
        ring: takes a record of every answer.
    """

    def __init__(
        self,
        rules: ConversionRules,
        protection: Protection,
        *,
        memory_lock: threading.Lock,
        ring: RecordRing,
    ) -> None:
        self._rules = rules
        self._protection = protection
        self._memory_lock = memory_lock
        self._ring = ring
        self._door: RequestDoor[Pending] = RequestDoor()
        self._closed: Stop | None = None
        self._records = 0

    # -- the vCPU threads' side ----------------------------------------------------------------------------

    @property
    def sequence(self) -> int:
        """The number of changes so far: read before KVM_RUN, it tells how old a fault is."""
        return self._rules.sequence

    @property
    def requested(self) -> int:
        """Requests that vCPU threads handed in so far, answered or not."""
        return self._door.count

    def request(self, request: ConversionRequest, waiter: Waiter) -> Answer:
        """Hand over a request and block the calling vCPU thread until it is answered."""
        if self._door.put(Pending(request, waiter)):
            return waiter.wait()
        return Answer(Outcome.FAILED, GuestResult.EAGAIN, stop=self._closed or _ENDED)

    # -- the event loop's side -----------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled. Whatever ends this, every request is answered."""
        # A vCPU has one request at a time, so the channel never holds more than there are vCPUs.
        send, receive = trio.open_memory_channel[list[Pending]](math.inf)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._carry, send)
                nursery.start_soon(self._retry_leaks)
                task_status.started()
                async for arrived in receive:
                    self._submit(arrived)
                    await self._serve(receive)
        finally:
            self._submit_carried(receive)
            self.close(_ENDED)

    def close(self, stop: Stop) -> None:
        """Answer all that waits and all that still comes with ``stop``: the machine is being torn down.

        Called on the event loop's thread; harmless the second time. A change that is being made in a worker thread
        is made to its end.
        """
        if self._closed is not None:
            return
        self._closed = stop
        self._submit(self._door.close())

    def dispose(self) -> None:
        """Give up what the door holds, once no thread uses the service any more; harmless the second time."""
        self._door.dispose()

    async def _carry(self, send: trio.MemorySendChannel[list[Pending]]) -> None:
        """Carry requests from the threads' door into the channel, all that came together as one message."""
        while True:
            send.send_nowait(await self._door.wait())

    def _submit(self, arrived: list[Pending]) -> None:
        for pending in arrived:
            self._rules.submit(pending)
        if self._closed is not None:
            # They were on their way through the channel when the service was closed.
            self._rules.fail_all(self._closed)
            self._deliver()

    def _submit_carried(self, receive: trio.MemoryReceiveChannel[list[Pending]]) -> None:
        with suppress(trio.WouldBlock):
            while True:
                self._submit(receive.receive_nowait())

    async def _serve(self, receive: trio.MemoryReceiveChannel[list[Pending]]) -> None:
        """Make changes until nothing is left to do, looking for new requests after each."""
        turn_ends = time.monotonic() + TURN_SECONDS
        while True:
            change = self._rules.next_change()
            self._deliver()
            if change is not None and change.range.pages <= INLINE_PAGES:
                self._make(change)
            elif change is not None:
                failure = await trio.to_thread.run_sync(self._make_apart, change)
                self._rules.finish(change, failure)
                self._deliver()
                # The porter was at work meanwhile: what it carried must not wait for all of a large change.
                self._submit_carried(receive)
            self._submit(self._door.take())
            left = turn_ends - time.monotonic()
            if left <= 0:
                # Other tasks of the loop have waited for this long.
                await trio.lowlevel.checkpoint()
                self._submit_carried(receive)
                left = TURN_SECONDS
                turn_ends = time.monotonic() + left
            if not self._rules.busy:
                arrived = self._door.linger(left)
                if not arrived and left >= LINGER_SECONDS:
                    return
                self._submit(arrived)

    # -- making a change -----------------------------------------------------------------------------------------------
    #
    # What has to be discarded first, attribute or slots, the state, the side left behind: all of it is one critical
    # section. A discard done after another change would destroy what the other side wrote meanwhile, and a reader of
    # shared memory must not find the page private in the middle.

    def _make(self, change: Change) -> None:
        """Make a small change in the event loop's thread.

        The vCPU is answered before the side left behind is discarded: nobody can touch that side until the service
        makes another change, and the guest goes on meanwhile.
        """
        with self._memory_lock:
            applied, failure = self._apply(change)
            self._rules.finish(change, failure)
            settled = self._answer()
            self._discard(change, applied)
        self._record(settled)

    def _make_apart(self, change: Change) -> Failure | None:
        """Make a large change, in a worker thread, while the event loop goes on."""
        with self._memory_lock:
            applied, failure = self._apply(change)
            self._discard(change, applied)
        return failure

    def _apply(self, change: Change) -> tuple[GpaRange | None, Failure | None]:
        """Bring the pages into their new state, as far as the backend does, and record it."""
        started_ns = time.monotonic_ns()
        applied = None
        failure = self._discard_first(change) if change.discard_first else None
        if failure is None:
            outcome = self._protection.apply(change.range, change.to)
            failure = outcome.failure
            applied = self._rules.commit(change, outcome.end)
        elapsed_ns = time.monotonic_ns() - started_ns
        for ticket in change.tickets:
            if isinstance(ticket, Pending):
                ticket.started_ns = ticket.started_ns or started_ns
                ticket.apply_ns += elapsed_ns
        if failure is not None:
            _log.warning("change-failed", range=str(change.range), to=change.to.value, why=failure.message)
        return applied, failure

    def _discard(self, change: Change, applied: GpaRange | None) -> None:
        """Give the memory behind the side left behind back to the host, or note that it is leaked."""
        if applied is None:
            return
        started_ns = time.monotonic_ns()
        side = change.to.opposite
        try:
            self._protection.discard(applied, side)
        except BackendError as error:
            self._rules.leak(side, applied)
            _log.warning("discard-failed", why=str(error), remedy="kept, and tried again every second")
        elapsed_ns = time.monotonic_ns() - started_ns
        for ticket in change.tickets:
            if isinstance(ticket, Pending):
                ticket.discard_ns += elapsed_ns

    def _discard_first(self, change: Change) -> Failure | None:
        """Empty the side that becomes live, where an earlier discard of it had failed."""
        for range_ in change.discard_first:
            try:
                self._protection.discard(range_, change.to)
            except BackendError as error:
                return Failure(FailureKind.DISCARD_FIRST, f"old contents cannot be discarded: {error}")
            self._rules.discarded(change.to, range_)
        return None

    async def _retry_leaks(self) -> None:
        """Try again to discard what could not be, now and then."""
        while True:
            await trio.sleep(LEAK_RETRY_SECONDS)
            # Between two changes: none is being made while this task runs but in a worker thread, and that one holds
            # the lock.
            if not self._rules.leaked_bytes or not self._memory_lock.acquire(blocking=False):
                continue
            try:
                for side, range_ in self._rules.leaks():
                    with suppress(BackendError):
                        self._protection.discard(range_, side)
                        self._rules.discarded(side, range_)
            finally:
                self._memory_lock.release()

    # -- answers ---------------------------------------------------------------------------------------------

    def _deliver(self) -> None:
        """Answer what the rules settled, then write the records: the guest comes first."""
        if self._rules.has_settled:
            self._record(self._answer())

    def _answer(self) -> list[Pending]:
        """Wake the threads whose requests the rules settled."""
        settled = [ticket for ticket in self._rules.take_settled() if isinstance(ticket, Pending)]
        for ticket in settled:
            if ticket.answer is not None:
                ticket.waiter.answer(self._with_access(ticket.request, ticket.answer))
        return settled

    def _with_access(self, request: ConversionRequest, answer: Answer) -> Answer:
        """Make the access that came as MMIO, before any other change can move the page again."""
        if request.access is None or answer.stop is not None:
            return answer
        return Answer(answer.outcome, answer.result, self._protection.access(request.to, request.access))

    def _record(self, settled: list[Pending]) -> None:
        if self._closed is not None:
            return  # what the machine's end cut off says nothing about conversions
        wall_ns, monotonic_ns = time.time_ns(), time.monotonic_ns()
        for ticket in settled:
            if ticket.answer is not None:
                self._ring.append(self._record_of(ticket, ticket.answer, wall_ns, monotonic_ns))

    def _record_of(self, ticket: Pending, answer: Answer, wall_ns: int, monotonic_ns: int) -> ConversionRecord:
        request = ticket.request
        self._records += 1
        return ConversionRecord(
            sequence=self._records,
            wall_ns=wall_ns,
            monotonic_ns=monotonic_ns,
            vcpu=request.vcpu,
            cause=request.cause,
            gpa=request.gpa,
            size_bytes=request.size_bytes,
            came_from=ticket.came_from,
            to=request.to,
            outcome=answer.outcome,
            merged=ticket.merged if answer.outcome is Outcome.CONVERTED else 0,
            waiting_us=((ticket.started_ns or monotonic_ns) - ticket.arrived_ns) / 1000,
            applying_us=ticket.apply_ns / 1000,
            discarding_us=ticket.discard_ns / 1000,
        )
