"""The conversion service: one task a machine that makes all conversions, one after the other.

The rules are in ``kvmd.conversion.rules``; this is the shell that moves messages::

    vCPU thread ──ticket──> queue ──carried over──> trio channel ──> service task
         ^         (kvmd.request_channel)                           │ rules, protection
         └────────── a bell that wakes just this thread <── answer ──┘
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from operator import attrgetter

import structlog
import trio

from kvmd.bell import Bell
from kvmd.conversion.changes import Change, Failure, FailureKind, Ticket
from kvmd.conversion.messages import DONE, Answer, ConversionRequest, GuestResult, MmioAccess, Outcome
from kvmd.conversion.rate_limit import RateLimit
from kvmd.conversion.recording import records_of
from kvmd.conversion.ring import RecordRing
from kvmd.conversion.rules import ConversionRules
from kvmd.errors import BackendError
from kvmd.loop_turn import LoopTurn
from kvmd.protection.base import Applied, Protection
from kvmd.ranges import GpaRange
from kvmd.request_channel import RequestChannel
from kvmd.service_place import ServicePlace
from kvmd.stop import Stop, StopReason
from kvmd.units import PAGE_SIZE

_log: structlog.stdlib.BoundLogger = structlog.get_logger("kvmd.conversion_service")

INLINE_PAGES = 16
"""A change of more pages is made in a worker thread, so that the event loop goes on meanwhile. Handing one over costs
about as much as converting a page."""

_INLINE_BYTES = INLINE_PAGES * PAGE_SIZE
_now_ns = time.monotonic_ns
_vcpu_of = attrgetter("vcpu")

TURN_NS = 4_000_000
"""The longest that the service keeps the event loop to itself while requests keep coming, in nanoseconds.

A turn of the loop costs as much as four or five hand-offs."""

FULL_TURN_REQUESTS = 16
"""Answered requests after which others have the event loop until they have nothing to do, not for one pass. On a host
that is so busy that a turn is over after one or two, who follows the records would be woken for each."""

UNRECORDED_MOST = 32
"""Answers whose records are written in one go, unless the service gives up the loop before."""

LEAK_RETRY_SECONDS = 1.0
"""How often memory that could not be discarded is tried again."""


_ENDED = Stop.because(StopReason.BUG, "the conversion service ended under a running guest")


class ConversionService:
    """Serialises the conversions of one machine.

    Args:
        rules: decide; owned by this service from now on.
        protection: makes changes real.
        memory_lock: held while memory changes hands, and by whoever reads guest memory for the host.
        ring: takes a record of every answer.
        rate: counts every change; None where there is no limit.
        place: where it runs; by default where the scheduler likes.

    Attributes:
        sequence: the number of changes so far: read before KVM_RUN, it tells how old a fault is.
    """

    def __init__(
        self,
        rules: ConversionRules,
        protection: Protection,
        *,
        memory_lock: threading.Lock,
        ring: RecordRing,
        rate: RateLimit | None = None,
        place: ServicePlace | None = None,
    ) -> None:
        self._rules = rules
        self.sequence = rules.sequence
        self._protection = protection
        self._memory_lock = memory_lock
        self._ring = ring
        self._rate = rate
        self._channel: RequestChannel[Ticket] = RequestChannel(self._answer_late)
        self._closed: Stop | None = None
        self._apart = False
        self._answered_ns = 0
        # A worker thread may add to it while the event loop takes out of it.
        self._unrecorded: deque[Ticket] = deque()
        self._records = 0
        self._place = place or ServicePlace()
        self._turn = LoopTurn()
        self._given_at = 0

    # -- the vCPU threads' side ----------------------------------------------------------------------------

    @property
    def requested(self) -> int:
        """Requests that vCPU threads handed in so far, answered or not."""
        return self._channel.count

    def request(self, request: ConversionRequest, bell: Bell) -> Answer:
        """Hand over a request, and block the calling vCPU thread, at its bell, until it is answered.

        Every request is, at teardown too.
        """
        ticket = Ticket(request, bell.ring, _now_ns())
        self._channel.put(ticket)
        bell.wait()
        while (answer := ticket.answer) is None:
            bell.wait()
        return answer

    def _answer_late(self, ticket: Ticket) -> None:
        ticket.answer = Answer(Outcome.FAILED, GuestResult.EAGAIN, stop=self._closed or _ENDED)
        ticket.wake()

    # -- the event loop's side -----------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled. Whatever ends this, every request is answered."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._channel.carry)
                nursery.start_soon(self._retry_leaks)
                task_status.started()
                with self._turn.watching():
                    while True:
                        await self._serve(await self._channel.receive())
        finally:
            self._place.leave()
            self.close(_ENDED)

    def close(self, stop: Stop) -> None:
        """Answer all that waits and all that still comes with ``stop``: the machine is being torn down.

        Called on the event loop's thread; harmless the second time. A change that is being made in a worker thread
        is made to its end, and its vCPU answered then.
        """
        if self._closed is None:
            self._closed = stop
        for ticket in self._channel.close():
            self._answer_late(ticket)
        if not self._apart:
            self._rules.fail_all(self._closed)
            self._answer()

    def dispose(self) -> None:
        """Give up the channel, once no thread uses the service any more; harmless the second time."""
        self._channel.dispose()

    async def _serve(self, arrived: list[Ticket]) -> None:
        """Make changes until nothing is left to do, looking for new requests after each.

        A thread that is woken wants the GIL, and is put to sleep again where it cannot have it, which costs more than
        the rules do. So little is left to do once a thread was answered: less than its waking takes.
        """
        rules, channel, unrecorded = self._rules, self._channel, self._unrecorded
        submit, next_change, linger = rules.submit, rules.next_change, channel.linger
        channel.attend()
        arrived += channel.take()
        turn_ends = time.monotonic_ns() + TURN_NS
        while True:
            for ticket in arrived:
                submit(ticket)
            if self._closed is not None:
                # They were on their way through the channel when the service was closed.
                rules.fail_all(self._closed)
            change = next_change()
            if rules.settled:
                unrecorded.extend(self._answer())
            if change is not None:
                if change.range.end - change.range.start <= _INLINE_BYTES:
                    self._make(change)
                else:
                    await self._move_apart(change)
            if len(unrecorded) >= UNRECORDED_MOST:
                self._record()
            if self._answered_ns >= turn_ends:
                self._record()
                self._place.pause()
                await self._give_turn()
                self._place.resume()
                turn_ends = time.monotonic_ns() + TURN_NS
            busy = change is not None and rules.busy
            arrived = channel.take() if busy else linger()
            if not (arrived or busy or (arrived := self._take_last())):
                return

    async def _give_turn(self) -> None:
        """Let the event loop's other tasks go on."""
        if self._records - self._given_at < FULL_TURN_REQUESTS:
            await trio.lowlevel.checkpoint()
        else:
            self._given_at = self._records
            await self._turn.give()

    def _take_last(self) -> list[Ticket]:
        """Leave the channel to its porter; or go on attending to it, with what came just before."""
        self._record()
        self._place.leave()
        self._channel.leave()
        if arrived := self._channel.take():
            self._channel.attend()
        return arrived

    async def _move_apart(self, change: Change) -> None:
        """Let a worker thread serve, so that the event loop goes on while a large change is made."""
        self._record()
        self._place.leave()
        self._apart = True
        try:
            await trio.to_thread.run_sync(self._serve_apart, change, trio.lowlevel.current_trio_token())
        finally:
            self._apart = False
        if self._closed is not None:
            self._rules.fail_all(self._closed)
            self._answer()

    def _serve_apart(self, change: Change | None, token: trio.lowlevel.TrioToken) -> None:
        """Make a large change and what comes meanwhile, in a worker thread; the rules are this thread's until then.

        A turn through the event loop for each chunk, or for each small request in between, would cost more than a chunk
        does. So what comes meanwhile is taken from the threads' queue, and does not go over the trio channel.
        """
        while change is not None:
            if change.range.size_bytes <= _INLINE_BYTES:
                self._make(change)
            else:
                self._make_large(change)
            if self._unrecorded:
                token.run_sync_soon(self._record, idempotent=True)
            if self._closed is not None or not self._rules.has_long:
                return
            trio.from_thread.check_cancelled()
            for ticket in self._channel.take_apart():
                self._rules.submit(ticket)
            change = self._rules.next_change()
            self._unrecorded.extend(self._answer())

    # -- making a change -----------------------------------------------------------------------------------------------
    #
    # What has to be discarded first, attribute or slots, the state, the side left behind: all of it is one critical
    # section. A discard done after another change would destroy what the other side wrote meanwhile, and a reader of
    # shared memory must not find the page private in the middle.

    def _make(self, change: Change) -> None:
        """Make a small change.

        The vCPU is answered before the side left behind is discarded: nobody can touch that side until the service
        makes another change, and the guest goes on meanwhile. Where its answer is certain, it is answered before the
        change is recorded, too: whatever it asks next waits until that is done.
        """
        with self._memory_lock:
            started_ns = _now_ns()
            if self._rate is not None:
                self._rate.count(started_ns)
            outcome = self._apply(change)
            alone = change.alone
            if alone is not None and outcome.failure is None:
                self._answered_ns = answered_ns = _now_ns()
                alone.answered_ns, alone.answer = answered_ns, DONE
                alone.wake()
                alone.started_ns, alone.apply_ns = started_ns, answered_ns - started_ns
                self._discard(change, change.range)
                self._rules.made(change, alone)
                self.sequence = self._rules.sequence
                # What the machine's end cut off says nothing about conversions.
                settled: Sequence[Ticket] = (alone,) if self._closed is None else ()
            else:
                applied = self._commit(change, outcome, started_ns, _now_ns())
                self._rules.finish(change, outcome.failure)
                settled = self._answer()
                if applied is not None:
                    self._discard(change, applied)
        self._unrecorded.extend(settled)

    def _make_large(self, change: Change) -> None:
        """Make a change that may be one chunk of many. Where the machine ends meanwhile, nobody is answered here."""
        with self._memory_lock:
            started_ns = time.monotonic_ns()
            if self._rate is not None:
                self._rate.count(started_ns)
            outcome = self._apply(change)
            applied = self._commit(change, outcome, started_ns, time.monotonic_ns())
            if applied is not None:
                self._discard(change, applied)
        if self._closed is None:
            self._rules.finish(change, outcome.failure)
            self._unrecorded.extend(self._answer())

    def _apply(self, change: Change) -> Applied:
        """Bring the pages into their new state, as far as the backend does."""
        if change.discard_first and (failure := self._discard_first(change)) is not None:
            return Applied(change.range.start, failure)
        return self._protection.apply(change.range, change.to)

    def _commit(self, change: Change, outcome: Applied, started_ns: int, ended_ns: int) -> GpaRange | None:
        """Record what was applied, and return it; None for nothing."""
        for ticket in change.tickets:
            ticket.started_ns = ticket.started_ns or started_ns
            ticket.apply_ns += ended_ns - started_ns
        if outcome.failure is not None:
            _log.warning("change-failed", range=str(change.range), to=change.to.value, why=outcome.failure.message)
        applied = self._rules.commit(change, outcome.end)
        self.sequence = self._rules.sequence
        return applied

    def _discard(self, change: Change, applied: GpaRange) -> None:
        """Give the memory behind the side left behind back to the host, or note that it is leaked."""
        started_ns = _now_ns()
        side = change.to.opposite
        try:
            self._protection.discard(applied, side)
        except BackendError as error:
            self._rules.leak(side, applied)
            _log.warning("discard-failed", why=str(error), remedy="kept, and tried again every second")
        elapsed_ns = _now_ns() - started_ns
        for ticket in change.tickets:
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
            # Between two changes: none is being made while this task runs but in a worker thread.
            if self._apart or not self._rules.leaked_bytes or not self._memory_lock.acquire(blocking=False):
                continue
            try:
                for side, range_ in self._rules.leaks():
                    with suppress(BackendError):
                        self._protection.discard(range_, side)
                        self._rules.discarded(side, range_)
            finally:
                self._memory_lock.release()

    # -- answers ---------------------------------------------------------------------------------------------

    def _answer(self) -> Sequence[Ticket]:
        """Wake the threads whose requests the rules settled, and return what is to be recorded."""
        rules = self._rules
        settled = rules.settled
        if not settled:
            return ()
        rules.settled = []
        self._answered_ns = answered_ns = _now_ns()
        for ticket in settled:
            ticket.answered_ns = answered_ns
            answer = ticket.answer
            if answer is not None:
                access = ticket.request.access
                if access is not None:
                    ticket.answer = self._with_access(ticket.request, access, answer)
                ticket.wake()
        # What the machine's end cut off says nothing about conversions.
        return settled if self._closed is None else ()

    def _with_access(self, request: ConversionRequest, access: MmioAccess, answer: Answer) -> Answer:
        """Make the access that came as MMIO, before any other change can move the page again."""
        if answer.stop is not None:
            return answer
        try:
            data = self._protection.access(request.to, access)
        except Exception as error:  # noqa: BLE001 - it must end the machine by this vCPU, and leave none unanswered
            _log.exception("access-failed", gpa=hex(access.gpa), size=access.size)
            stop = Stop.because(StopReason.BUG, f"a bug of kvmd's in a guest's access: {error!r}", vcpu=request.vcpu)
            return Answer(Outcome.FAILED, GuestResult.EAGAIN, stop=stop)
        return Answer(answer.outcome, answer.result, data)

    def _record(self) -> None:
        """Write the records that were put off."""
        records = records_of(self._unrecorded, self._records, time.time_ns() - _now_ns())
        self._records += len(records)
        self._place.served(map(_vcpu_of, records))
        self._ring.extend(records)
