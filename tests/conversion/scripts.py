"""Plays the rules of conversion like a script: requests in, changes made at once, answers out."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvmd.conversion.changes import Change, Failure, Limits, Ticket
from kvmd.conversion.messages import DONE, Answer, Cause, ConversionRequest, MmioAccess
from kvmd.conversion.rules import ConversionRules
from kvmd.memory.page_state import PageStateMap
from kvmd.ranges import GpaRange, PageState
from kvmd.units import PAGE_SIZE

PRIVATE, SHARED = PageState.PRIVATE, PageState.SHARED
MEMORY_PAGES = 64
PINNED_PAGES = 4


def pages(first: int, count: int = 1) -> GpaRange:
    """Return ``count`` pages from page number ``first``."""
    return GpaRange(first * PAGE_SIZE, (first + count) * PAGE_SIZE)


def request(
    vcpu: int,
    range_: GpaRange,
    to: PageState,
    cause: Cause = Cause.IMPLICIT,
    *,
    entered_at: int = 0,
    access: MmioAccess | None = None,
) -> ConversionRequest:
    """Return a request for whole pages."""
    return ConversionRequest(
        vcpu=vcpu,
        cause=cause,
        gpa=range_.start,
        size_bytes=range_.size_bytes,
        to=to,
        entered_at=entered_at,
        access=access,
    )


@dataclass
class Script:
    """Rules over a small memory, with a log of the changes they asked for."""

    limits: Limits = field(default_factory=Limits)
    memory_pages: int = MEMORY_PAGES
    changes: list[Change] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.state = PageStateMap(self.memory_pages * PAGE_SIZE, PRIVATE)
        self.rules = ConversionRules(self.state, pinned=pages(0, PINNED_PAGES), limits=self.limits)

    def submit(self, request_: ConversionRequest) -> Ticket:
        """Hand in a request."""
        ticket = Ticket(request_)
        self.rules.submit(ticket)
        return ticket

    @staticmethod
    def is_answered(ticket: Ticket) -> bool:
        """Tell whether the ticket was settled, without making a type checker believe that it stays so."""
        return ticket.answer is not None

    def step(self) -> Change | None:
        """Take the next change without making it."""
        change = self.rules.next_change()
        if change is not None:
            self.changes.append(change)
        return change

    def make(self, change: Change, *, failure: Failure | None = None, upto: int | None = None) -> None:
        """Make a change, or as much of it as ``upto`` says."""
        for range_ in change.discard_first:
            self.rules.discarded(change.to, range_)
        if change.alone is not None and failure is None and upto is None:
            # The short way, as the service takes it: it answers, and keeps the ticket itself.
            change.alone.answer = DONE
            self.rules.made(change, change.alone)
            self.rules.settled.append(change.alone)
            return
        self.rules.commit(change, change.range.end if upto is None else upto)
        self.rules.finish(change, failure)

    def run(self) -> None:
        """Make changes until nothing is left to do."""
        while (change := self.step()) is not None:
            self.make(change)

    def take_settled(self) -> list[Ticket]:
        """Take the tickets that were answered since the last call."""
        settled, self.rules.settled = self.rules.settled, []
        return settled

    def ask(self, request_: ConversionRequest) -> Answer:
        """Hand in a request, run, and return its answer."""
        ticket = self.submit(request_)
        self.run()
        assert ticket.answer is not None
        return ticket.answer
