"""The rules of conversion against a model: any requests, in any order, with a host that fails now and then."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvmd.conversion.changes import Change, Failure, FailureKind, Limits, Ticket
from kvmd.conversion.messages import Cause, ConversionRequest, GuestResult, Outcome
from kvmd.ranges import GpaRange, PageState
from kvmd.units import PAGE_SIZE
from tests.conversion.scripts import PINNED_PAGES, PRIVATE, Script

VCPUS = 6
CHUNK_PAGES = 3
MEMORY_PAGES = 14


class RulesMachine(RuleBasedStateMachine):
    """Each vCPU has at most one request under way, like a real one. The backend is a list of pages."""

    def __init__(self) -> None:
        super().__init__()
        self.script = Script(Limits(chunk_bytes=CHUNK_PAGES * PAGE_SIZE, no_progress=3, segments=10), MEMORY_PAGES)
        self.backend = [PRIVATE] * MEMORY_PAGES
        self.dirty: dict[PageState, set[int]] = {side: set() for side in PageState}
        self.waiting: dict[int, Ticket] = {}
        self.change: Change | None = None

    def _pages(self, range_: GpaRange) -> range:
        return range(range_.start // PAGE_SIZE, range_.end // PAGE_SIZE)

    def _collect(self) -> None:
        for ticket in self.script.take_settled():
            vcpu = ticket.request.vcpu
            assert self.waiting.pop(vcpu) is ticket, "one answer for each request, and to whoever asked"
            answer = ticket.answer
            assert answer is not None
            assert answer.result in set(GuestResult)
            if ticket.request.cause is Cause.EXPLICIT:
                assert answer.stop is None, "an explicit request never stops the machine"
            if answer.outcome in {Outcome.CONVERTED, Outcome.SPURIOUS}:
                self._check_success(ticket)

    def _check_success(self, ticket: Ticket) -> None:
        request = ticket.request
        assert request.size_bytes > 0
        first, end = request.gpa // PAGE_SIZE, (request.gpa + request.size_bytes) // PAGE_SIZE
        assert end <= MEMORY_PAGES
        states = set(self.backend[first:end])
        assert states == {request.to}, "what was answered is what is so"

    @rule(
        vcpu=st.integers(0, VCPUS - 1),
        first=st.integers(0, MEMORY_PAGES + 2),
        count=st.integers(0, 10),
        to=st.sampled_from(PageState),
        explicit=st.booleans(),
        offset=st.sampled_from([0, 0, 0, 0, 8]),
        age=st.integers(0, 3),
    )
    def ask(self, vcpu: int, first: int, count: int, to: PageState, *, explicit: bool, offset: int, age: int) -> None:
        if vcpu in self.waiting:
            return
        request = ConversionRequest(
            vcpu=vcpu,
            cause=Cause.EXPLICIT if explicit else Cause.IMPLICIT,
            gpa=first * PAGE_SIZE + (offset if explicit else 0),
            size_bytes=(count if explicit else 1) * PAGE_SIZE,
            to=to,
            entered_at=max(0, self.script.rules.sequence - age),
        )
        self.waiting[vcpu] = self.script.submit(request)

    @precondition(lambda self: self.change is None)
    @rule()
    def decide(self) -> None:
        self.change = self.script.step()
        self._collect()
        if self.change is None:
            assert not self.waiting, "nothing waits once nothing is left to do"
            return
        pages = self._pages(self.change.range)
        assert 0 < len(pages) <= CHUNK_PAGES
        assert pages[0] >= PINNED_PAGES
        assert pages[-1] < MEMORY_PAGES
        # Its ends change; between them there may be pages that are right already.
        assert self.backend[pages[0]] is self.backend[pages[-1]] is self.change.to.opposite

    @precondition(lambda self: self.change is not None)
    @rule(done=st.integers(0, CHUNK_PAGES), leak=st.booleans(), fail=st.sampled_from([None, None, *FailureKind]))
    def make(self, done: int, *, leak: bool, fail: FailureKind | None) -> None:
        change = self.change
        assert change is not None
        self.change = None
        rules = self.script.rules
        pages = self._pages(change.range)
        if fail is FailureKind.DISCARD_FIRST and not change.discard_first:
            fail = None
        if fail is FailureKind.DISCARD_FIRST:
            rules.finish(change, Failure(fail, "discard"))
            self._collect()
            return
        for range_ in change.discard_first:
            self.dirty[change.to] -= set(self._pages(range_))
            rules.discarded(change.to, range_)
        if fail is not None:
            pages = pages[: min(done, len(pages) - 1)]
        for page in pages:
            assert page not in self.dirty[change.to], "a side never becomes live with old contents"
            self.backend[page] = change.to
        applied = rules.commit(change, change.range.start + len(pages) * PAGE_SIZE)
        assert (applied is None) == (not pages)
        if leak:
            if applied is not None:
                rules.leak(change.to.opposite, applied)
            self.dirty[change.to.opposite] |= set(pages)
        else:
            self.dirty[change.to.opposite] -= set(pages)
        rules.finish(change, None if fail is None else Failure(fail, "host"))
        self._collect()

    @invariant()
    def state_is_the_backend(self) -> None:
        state = self.script.state
        tracked = [segment.state for segment in state.segments() for _ in range(segment.range.pages)]
        assert tracked == self.backend
        assert len(state) <= 10

    @invariant()
    def leaks_are_what_is_dirty(self) -> None:
        leaked: dict[PageState, set[int]] = {side: set() for side in PageState}
        for side, range_ in self.script.rules.leaks():
            leaked[side] |= set(self._pages(range_))
        for side in PageState:
            assert leaked[side] >= self.dirty[side]
            assert all(self.backend[page] is not side for page in leaked[side]), "only a dead side is leaked"

    def teardown(self) -> None:
        for _ in range(1000):
            if self.change is not None:
                self.make(CHUNK_PAGES, leak=False, fail=None)
            self.decide()
            if self.change is None:
                return
        raise AssertionError("the rules never come to rest")


TestRules = RulesMachine.TestCase
TestRules.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
