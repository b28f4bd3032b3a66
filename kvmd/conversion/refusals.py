"""What a request is told that is not converted, and why the machine stops where it was a fault."""

from __future__ import annotations

from typing import Final

from kvmd.conversion.changes import Failure, FailureKind, ImplicitPolicy
from kvmd.conversion.messages import IMPLICIT, Answer, ConversionRequest, GuestResult, Outcome
from kvmd.ranges import GpaRange
from kvmd.stop import Stop, StopReason
from kvmd.units import format_size

STATE_EXHAUSTED: Final = Failure(FailureKind.REFUSED, "no room for more ranges of page state (conversion.max_ranges)")

_STOP_REASON = {
    FailureKind.SLOTS: StopReason.MEMSLOTS_EXHAUSTED,
    FailureKind.DISCARD_FIRST: StopReason.DISCARD_FAILED,
    FailureKind.REFUSED: StopReason.BACKEND_FAILED,
}


def impossible(request: ConversionRequest, range_: GpaRange | None, *, pinned_end: int, memory_end: int) -> Answer:
    """Answer what cannot be done: a hypercall gets EINVAL and goes on, a fault cannot.

    Args:
        request: what was asked.
        range_: the pages that it asked for; None where it names none.
        pinned_end: the end of the pages from 0 on that stay as they are.
        memory_end: the end of memory.
    """
    stop = None
    if request.cause is IMPLICIT:
        where = _where(request)
        if range_ is None or range_.end > memory_end:
            stop = Stop.because(
                StopReason.FAULT_OUTSIDE_MEMORY,
                f"memory fault outside memory of {format_size(memory_end)}: {where}, to {request.to.value}",
                vcpu=request.vcpu,
            )
        else:
            stop = Stop.because(
                StopReason.PINNED_MEMORY,
                f"fault for a conversion of pinned memory [0x0, {pinned_end:#x}) (image, page tables, "
                f"stacks, boot information), which stays as it is: {where}, to {request.to.value}",
                vcpu=request.vcpu,
            )
    return Answer(Outcome.REFUSED, GuestResult.EINVAL, stop=stop)


def denied(request: ConversionRequest, policy: ImplicitPolicy) -> Answer:
    """Answer a fault that the policy does not let convert anything."""
    stop = Stop.because(
        StopReason.IMPLICIT_DENIED,
        f'implicit conversion denied (conversion.implicit = "{policy.value}"): {_where(request)}, '
        f"to {request.to.value}",
        vcpu=request.vcpu,
    )
    return Answer(Outcome.REFUSED, stop=stop)


def failed(request: ConversionRequest, failure: Failure) -> Answer:
    """Answer what the host could not do: a hypercall may try again, a fault would come back for ever."""
    stop = None
    if request.cause is IMPLICIT:
        reason = StopReason.STATE_EXHAUSTED if failure is STATE_EXHAUSTED else _STOP_REASON[failure.kind]
        stop = Stop.because(
            reason,
            f"{failure.message}, in converting {_where(request)} to {request.to.value}",
            vcpu=request.vcpu,
        )
    return Answer(Outcome.FAILED, GuestResult.EAGAIN, stop=stop)


def _where(request: ConversionRequest) -> str:
    return f"gpa {request.gpa:#x} size {request.size_bytes:#x}"
