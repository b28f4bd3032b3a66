"""What a request is told that is not converted, asked through the rules."""

from __future__ import annotations

import pytest

from kvmd.conversion.changes import Failure, FailureKind
from kvmd.conversion.messages import Cause, ConversionRequest, GuestResult, Outcome
from kvmd.ranges import GPA_LIMIT, PageState
from kvmd.stop import StopReason
from kvmd.units import PAGE_SIZE
from tests.conversion.scripts import MEMORY_PAGES, PINNED_PAGES, PRIVATE, SHARED, Script, pages, request

EXPLICIT = Cause.EXPLICIT


@pytest.mark.parametrize(
    ("gpa", "size"),
    [
        (10 * PAGE_SIZE + 1, PAGE_SIZE),
        (10 * PAGE_SIZE, PAGE_SIZE + 1),
        (10 * PAGE_SIZE, 0),
        (MEMORY_PAGES * PAGE_SIZE, PAGE_SIZE),
        ((MEMORY_PAGES - 1) * PAGE_SIZE, 2 * PAGE_SIZE),
        (10 * PAGE_SIZE, (1 << 52) * PAGE_SIZE),
        ((1 << 64) - PAGE_SIZE, 2 * PAGE_SIZE),
        (GPA_LIMIT - PAGE_SIZE, PAGE_SIZE),
        ((PINNED_PAGES - 1) * PAGE_SIZE, PAGE_SIZE),
        ((PINNED_PAGES - 1) * PAGE_SIZE, 2 * PAGE_SIZE),
        (0, MEMORY_PAGES * PAGE_SIZE),
    ],
)
@pytest.mark.parametrize("to", [PRIVATE, SHARED])
def test_an_explicit_request_that_cannot_be_meant_gets_einval_and_the_guest_goes_on(
    gpa: int, size: int, to: PageState
) -> None:
    script = Script()
    answer = script.ask(ConversionRequest(vcpu=0, cause=EXPLICIT, gpa=gpa, size_bytes=size, to=to, entered_at=0))
    assert (answer.outcome, answer.result, answer.stop) == (Outcome.REFUSED, GuestResult.EINVAL, None)
    assert script.changes == []


def test_unknown_attribute_bits_get_einval() -> None:
    script = Script()
    bad = ConversionRequest(
        vcpu=0, cause=EXPLICIT, gpa=10 * PAGE_SIZE, size_bytes=PAGE_SIZE, to=SHARED, entered_at=0, valid=False
    )
    assert script.ask(bad).result is GuestResult.EINVAL
    assert script.changes == []


@pytest.mark.parametrize(
    ("page", "reason"),
    [(0, StopReason.PINNED_MEMORY), (PINNED_PAGES - 1, StopReason.PINNED_MEMORY)],
)
def test_a_fault_for_pinned_memory_stops_the_machine(page: int, reason: StopReason) -> None:
    answer = Script().ask(request(0, pages(page), SHARED))
    assert answer.stop is not None
    assert answer.stop.reason is reason
    assert answer.stop.vcpu == 0


def test_pinned_memory_that_is_in_its_state_is_only_a_spurious_fault() -> None:
    assert Script().ask(request(0, pages(0), PRIVATE)).outcome is Outcome.SPURIOUS


@pytest.mark.parametrize("gpa", [MEMORY_PAGES * PAGE_SIZE, GPA_LIMIT, (1 << 64) - PAGE_SIZE])
def test_a_fault_outside_memory_stops_the_machine(gpa: int) -> None:
    fault = ConversionRequest(vcpu=1, cause=Cause.IMPLICIT, gpa=gpa, size_bytes=PAGE_SIZE, to=SHARED, entered_at=0)
    answer = Script().ask(fault)
    assert answer.stop is not None
    assert answer.stop.reason is StopReason.FAULT_OUTSIDE_MEMORY
    assert f"{gpa:#x}" in answer.stop.message


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (FailureKind.SLOTS, StopReason.MEMSLOTS_EXHAUSTED),
        (FailureKind.REFUSED, StopReason.BACKEND_FAILED),
        (FailureKind.DISCARD_FIRST, StopReason.DISCARD_FAILED),
    ],
)
def test_a_failing_host_is_eagain_for_a_hypercall_and_the_end_for_a_fault(
    kind: FailureKind, reason: StopReason
) -> None:
    script = Script()
    for cause in (EXPLICIT, Cause.IMPLICIT):
        ticket = script.submit(request(7, pages(10), SHARED, cause))
        change = script.step()
        assert change is not None
        script.make(change, failure=Failure(kind, "KVM says no"), upto=change.range.start)
        assert ticket.answer is not None
        assert (ticket.answer.outcome, ticket.answer.result) == (Outcome.FAILED, GuestResult.EAGAIN)
        stop = ticket.answer.stop
        if cause is EXPLICIT:
            assert stop is None
        else:
            assert stop is not None
            assert (stop.reason, stop.vcpu) == (reason, 7)
            assert "KVM says no" in stop.message
        assert script.state.state_of(pages(10)) is PRIVATE
