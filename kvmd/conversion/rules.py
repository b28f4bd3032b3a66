"""The rules of conversion: requests in; changes to make, and answers, out. No I/O, no clock, no threads.

The caller (``kvmd.conversion_service``, or a test that plays a script) turns this handle::

    rules.submit(ticket)                      # any number of them, at any time
    while change := rules.next_change():      # decides; answers what needs no change
        ...                                   # make it: discard_first, apply
        rules.commit(change, end)             # what was applied is the state now
        rules.finish(change, failure)         # decides who is answered
        ...                                   # discard the side left behind, or rules.leak(side, range)
        # or, where change.alone was answered at once: rules.made(change, change.alone)
    settled, rules.settled = rules.settled, []  # after each call above: tickets with their answers

At most one change is being made at any time; that is what serialises the machine's vCPUs. A large request is
made in chunks, and between two of them the smaller requests of other vCPUs have their turn.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import islice

from kvmd.conversion import refusals
from kvmd.conversion.changes import Change, Failure, ImplicitPolicy, Limits, Ticket
from kvmd.conversion.messages import DONE, EXPLICIT, IMPLICIT, Answer, GuestResult, Outcome
from kvmd.conversion.no_progress import NoProgressWatch
from kvmd.memory.page_state import PageStateMap
from kvmd.memory.range_set import RangeSet
from kvmd.ranges import GpaRange, PageState
from kvmd.stop import Stop
from kvmd.units import PAGE_MASK

SHORT_TURNS = 8
"""Requests that fit in one chunk and may go before the next chunk of a longer one."""

_FEW = 8
"""With more pending requests it is less work to look at all of them once."""

_CUT_MOST = 2
"""Segments that page state has more after a change of one range: its two edges."""


@dataclass(slots=True)
class _Work:
    """Requests that one run of changes answers together."""

    range: GpaRange
    to: PageState
    explicit: bool
    tickets: list[Ticket]
    cursor: int = 0


class ConversionRules:
    """Decides on every conversion of one machine.

    Args:
        state: the state of the machine's pages; only these rules change it.
        pinned: pages from 0 on that never change their state, or None.
        limits: what a guest may ask.

    Attributes:
        state: the state of the machine's pages.
        sequence: the number of changes so far.
        settled: the tickets that were answered, in the order of their answers, until the caller takes the list and puts
            an empty one in its place: a method would be one more call for each request.
    """

    def __init__(self, state: PageStateMap, *, pinned: GpaRange | None, limits: Limits) -> None:
        self.state = state
        self.sequence = 0
        self._last_explicit = 0
        self._pinned_end = 0 if pinned is None else pinned.end
        self._memory_end = state.range.end
        self._limits = limits
        self._chunk_bytes = limits.chunk_bytes
        # Segments with which there is room for one request and no other: asked for each.
        self._roomy = limits.segments - _CUT_MOST
        self._asks_policy = limits.implicit is not ImplicitPolicy.ALLOW
        self._pending: deque[Ticket] = deque()
        self._short: deque[_Work] = deque()
        self._long: deque[_Work] = deque()
        self._turns = SHORT_TURNS
        self._current: _Work | Change | None = None
        self.settled: list[Ticket] = []
        self._progress = NoProgressWatch(limits.no_progress)
        self._leaks = {side: RangeSet() for side in PageState}

    # -- requests ------------------------------------------------------------------------------------------

    def submit(self, ticket: Ticket) -> None:
        """Take a request. It is looked at when its turn comes, since what is true now may not be then."""
        request = ticket.request
        start, end = request.gpa, request.gpa + request.size_bytes
        if request.cause is IMPLICIT:
            # A fault may name less than a page; what converts is whole pages.
            start, end = start & ~PAGE_MASK, (end + PAGE_MASK) & ~PAGE_MASK
        try:
            ticket.range = GpaRange(start, end)
        except ValueError:
            ticket.range = None
        self._pending.append(ticket)

    def fail_all(self, stop: Stop) -> None:
        """Answer all that is waiting with ``stop``: the machine is being torn down."""
        works: list[_Work | Change] = [*self._short, *self._long]
        if self._current is not None:
            works.append(self._current)
        for ticket in [ticket for work in works for ticket in work.tickets] + list(self._pending):
            self._settle(ticket, Answer(Outcome.FAILED, GuestResult.EAGAIN, stop=stop))
        for queue in (self._pending, self._short, self._long):
            queue.clear()
        self._current = None

    @property
    def busy(self) -> bool:
        """Tell whether ``next_change`` has anything to decide on."""
        return bool(self._pending or self._short or self._long)

    @property
    def has_long(self) -> bool:
        """Tell whether work is under way that takes more than one change."""
        return bool(self._long)

    # -- changes -------------------------------------------------------------------------------------------

    def next_change(self) -> Change | None:
        """Decide what comes next: answer what needs no change, and return the change to make, if any.

        Raises:
            RuntimeError: the last change was not finished: a bug of the caller's.
        """
        if self._current is not None:
            raise RuntimeError("the change before this one was not finished")
        pending = self._pending
        while pending and not (self._short or self._long) and self._first_stands_apart():
            change = self._decide_alone(pending.popleft())
            if change is not None:
                return change
        while True:
            # Again after each work that turned out to be done: requests may have waited for its pages. Not before the
            # short works are done where they are all: with none left, what waits can be decided like lone requests.
            if self._pending and (self._long or not self._short):
                self._admit()
            if not self._short and not self._long:
                return None
            work = self._take_turn()
            change = self._next_chunk(work)
            if change is not None:
                self._current = work
                return change
            self._complete(work)

    def commit(self, change: Change, end: int) -> GpaRange | None:
        """Record that the pages of the change below ``end`` are in their new state.

        Returns the range that was applied, whose other side is to be discarded now; None if it is empty.
        """
        if end <= change.range.start:
            return None
        applied = change.range if end == change.range.end else GpaRange(change.range.start, end)
        self.sequence += 1
        if change.explicit:
            self._last_explicit = self.sequence
        self.state.set(applied, change.to, self.sequence, explicit=change.explicit)
        return applied

    def made(self, change: Change, ticket: Ticket) -> None:
        """Record a change that was made whole for one fault, which has its answer: ``commit`` and ``finish`` in one.

        Nothing of it is left in ``settled``.
        """
        self._current = None
        self.sequence = sequence = self.sequence + 1
        self.state.set(change.range, change.to, sequence, explicit=False)
        self._progress.converted(ticket.request, sequence)

    def finish(self, change: Change, failure: Failure | None = None) -> None:
        """Take the outcome of the change: who is answered now, and what is done next.

        Args:
            change: the one that ``next_change`` returned last.
            failure: why it, or its rest, could not be made; None where it was.
        """
        work, self._current = self._current, None
        if work is None:
            return  # everybody was answered meanwhile: see fail_all
        if failure is not None:
            self._fail(work, failure)
            return
        if isinstance(work, Change):
            self._complete(work)
            return
        work.cursor = change.range.end
        if work.cursor < work.range.end:
            self._long.append(work)
        else:
            self._complete(work)

    # -- leaks ---------------------------------------------------------------------------------------------

    @property
    def leaked_bytes(self) -> int:
        """Bytes that are held although their side is dead."""
        return sum(ranges.size_bytes for ranges in self._leaks.values())

    def leak(self, side: PageState, range_: GpaRange) -> None:
        """Record that the dead side of the range could not be discarded."""
        self._leaks[side].add(range_)

    def leaks(self) -> list[tuple[PageState, GpaRange]]:
        """Return the dead sides that are still to be discarded; report each that was by ``discarded``."""
        return [(side, range_) for side, ranges in self._leaks.items() for range_ in ranges]

    def discarded(self, side: PageState, range_: GpaRange) -> None:
        """Record that the side's leaked pages in ``range_`` are discarded by now."""
        self._leaks[side].remove(range_)

    # -- admission: from pending to work -------------------------------------------------------------------

    def _first_stands_apart(self) -> bool:
        """Tell whether the first of few pending requests has nothing to do with the others."""
        pending = self._pending
        if len(pending) == 1:
            return True
        first = pending[0].range
        if first is None or len(pending) > _FEW:
            return first is None
        start, end = first.start, first.end
        for other in islice(pending, 1, None):
            range_ = other.range
            # As GpaRange.touches, without a call.
            if range_ is not None and range_.start <= end and start <= range_.end:
                return False
        return True

    def _decide_alone(self, ticket: Ticket) -> Change | None:
        """Decide on a request where no other is under way, or has to do with it: the usual case.

        Returns the change where it is the whole of what was asked; what is not that simple becomes work.
        """
        range_, request = ticket.range, ticket.request
        if range_ is None or not request.valid:
            self._refuse(ticket)
        elif self._needs_change(ticket, range_):
            if range_.end - range_.start > self._chunk_bytes or ticket.came_from is None:
                self._start(ticket, range_, self._pending, [])
                return None
            ticket.merged = 1
            to, leaked = request.to, self._leaks[request.to]
            explicit = request.cause is EXPLICIT
            alone = None if explicit or request.access is not None else ticket
            self._current = change = Change(
                range_, to, explicit, leaked.within(range_) if leaked else (), (ticket,), alone
            )
            return change
        return None

    def _admit(self) -> None:
        """Answer or make work of every pending request that no earlier one on its pages holds up."""
        held: list[Ticket] = []
        pending, self._pending = self._pending, deque()
        while pending:
            ticket = pending.popleft()
            range_ = ticket.range
            if range_ is None or not ticket.request.valid:
                self._refuse(ticket)
            elif self._is_held(range_, held):
                held.append(ticket)
            elif self._needs_change(ticket, range_):
                self._start(ticket, range_, pending, held)
        self._pending = deque(held)

    def _is_held(self, range_: GpaRange, held: list[Ticket]) -> bool:
        if not (held or self._short or self._long):
            return False
        return any(work.range.overlaps(range_) for queue in (self._short, self._long) for work in queue) or any(
            ticket.range is not None and ticket.range.overlaps(range_) for ticket in held
        )

    def _needs_change(self, ticket: Ticket, range_: GpaRange) -> bool:
        """Tell whether the request needs a change; answer it if not."""
        request = ticket.request
        if range_.end > self._memory_end:
            self._refuse(ticket)
            return False
        ticket.came_from, generation = self.state.look(range_)
        if range_.start < self._pinned_end and (request.cause is EXPLICIT or ticket.came_from is not request.to):
            self._refuse(ticket)
            return False
        if ticket.came_from is request.to:
            # The pages are in that state already: another vCPU was faster, or nothing will ever help.
            stop = self._progress.spurious(request, generation)
            self._settle(ticket, _SPURIOUS if stop is None else Answer(Outcome.FAILED, stop=stop))
            return False
        if (
            request.cause is IMPLICIT
            and (self._asks_policy or request.entered_at < self._last_explicit)
            and not self._may_convert_implicitly(ticket, range_)
        ):
            return False
        if (self._short or self._long or len(self.state) > self._roomy) and not self._has_room():
            self._settle(ticket, refusals.failed(request, refusals.STATE_EXHAUSTED))
            return False
        return True

    def _may_convert_implicitly(self, ticket: Ticket, range_: GpaRange) -> bool:
        """Tell whether a fault is recent, and allowed, to convert; answer it if not."""
        request = ticket.request
        policy = self._limits.implicit
        moving = [segment for segment in self.state.segments(range_) if segment.state is not request.to]
        # An access that came as MMIO cannot be tried again: KVM has decoded it and waits for its data.
        if request.access is None and any(segment.explicit_generation > request.entered_at for segment in moving):
            self._settle(ticket, Answer(Outcome.STALE))
            return False
        if policy is ImplicitPolicy.DENY or (
            policy is ImplicitPolicy.KEEP_EXPLICIT and any(segment.is_explicit for segment in moving)
        ):
            self._settle(ticket, refusals.denied(request, policy))
            return False
        return True

    def _has_room(self) -> bool:
        """Tell whether the state may be cut twice more for each work under way and for a new one."""
        limit = self._limits.segments - _CUT_MOST * (len(self._short) + len(self._long) + 1)
        if len(self.state) <= limit:
            return True
        self.state.compact()
        return len(self.state) <= limit

    def _start(self, ticket: Ticket, range_: GpaRange, pending: deque[Ticket], held: list[Ticket]) -> None:
        """Make work of the ticket, together with waiting requests that adjoin it and ask the same."""
        request = ticket.request
        work = _Work(range_, request.to, request.cause is EXPLICIT, [ticket], range_.start)
        if pending:
            self._merge_pending(work, pending, held)
        for member in work.tickets:
            member.merged = len(work.tickets)
        queue = self._short if work.range.size_bytes <= self._chunk_bytes else self._long
        queue.append(work)

    def _merge_pending(self, work: _Work, pending: deque[Ticket], held: list[Ticket]) -> None:
        grew = True
        while grew:
            grew = False
            for position, other in enumerate(pending):
                range_ = other.range
                if range_ is None or not self._adjoins(work, other, range_):
                    continue
                earlier = [*held, *(pending[index] for index in range(position))]
                if self._is_held(range_, earlier) or not self._needs_change(other, range_):
                    continue
                work.range = GpaRange(min(work.range.start, range_.start), max(work.range.end, range_.end))
                work.cursor = work.range.start
                work.tickets.append(other)
                del pending[position]
                grew = True
                break
            settled = [other for other in pending if other.answer is not None]
            for other in settled:
                pending.remove(other)

    @staticmethod
    def _adjoins(work: _Work, other: Ticket, range_: GpaRange) -> bool:
        request = other.request
        return (
            request.valid
            and other.answer is None
            and request.to is work.to
            and (request.cause is EXPLICIT) is work.explicit
            and range_.touches(work.range)
        )

    # -- turns ---------------------------------------------------------------------------------------------

    def _take_turn(self) -> _Work:
        """Take the next work: short ones first, but a long one is never kept waiting for ever."""
        if self._short and (self._turns > 0 or not self._long):
            self._turns -= 1
            return self._short.popleft()
        self._turns = SHORT_TURNS
        return self._long.popleft()

    def _next_chunk(self, work: _Work) -> Change | None:
        """Return the next change of the work, or None where nothing is left to change."""
        if work.cursor >= work.range.end:
            return None
        rest = GpaRange(work.cursor, work.range.end)
        start = self.state.first_in_state(work.to.opposite, rest)
        if start is None:
            return None
        window = GpaRange(start, min(start + self._chunk_bytes, work.range.end))
        range_ = GpaRange(start, self.state.end_in_state(work.to.opposite, window))
        return self._change(range_, work.to, explicit=work.explicit, tickets=tuple(work.tickets))

    def _change(self, range_: GpaRange, to: PageState, *, explicit: bool, tickets: tuple[Ticket, ...]) -> Change:
        leaked = self._leaks[to]
        return Change(range_, to, explicit, leaked.within(range_) if leaked else (), tickets)

    # -- answers -------------------------------------------------------------------------------------------

    def _settle(self, ticket: Ticket, answer: Answer) -> None:
        ticket.answer = answer
        self.settled.append(ticket)

    def _complete(self, work: _Work | Change) -> None:
        for ticket in work.tickets:
            self._progress.converted(ticket.request, self.sequence)
            self._settle(ticket, DONE)

    def _refuse(self, ticket: Ticket) -> None:
        answer = refusals.impossible(
            ticket.request, ticket.range, pinned_end=self._pinned_end, memory_end=self._memory_end
        )
        self._settle(ticket, answer)

    def _fail(self, work: _Work | Change, failure: Failure) -> None:
        for ticket in work.tickets:
            # Of merged requests, those that lie in what was applied are done all the same.
            if ticket.range is not None and self.state.state_of(ticket.range) is work.to:
                self._progress.converted(ticket.request, self.sequence)
                self._settle(ticket, DONE)
            else:
                self._settle(ticket, refusals.failed(ticket.request, failure))


_SPURIOUS = Answer(Outcome.SPURIOUS)
