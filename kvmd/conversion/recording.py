"""Makes records out of requests that were answered."""

from __future__ import annotations

from collections import deque

from kvmd.conversion.changes import Ticket
from kvmd.conversion.messages import CONVERTED
from kvmd.conversion.record import ConversionRecord


def records_of(answered: deque[Ticket], sequence: int, wall_offset_ns: int) -> list[ConversionRecord]:
    """Take all tickets out, and return their records, in order.

    Args:
        answered: the tickets; another thread may add to them meanwhile.
        sequence: the number of the last record before.
        wall_offset_ns: what the wall clock is ahead of the monotonic one.
    """
    records = []
    while answered:
        ticket = answered.popleft()
        request, answer, answered_ns = ticket.request, ticket.answer, ticket.answered_ns
        if answer is None:
            continue
        sequence += 1
        outcome = answer.outcome
        # By position, which takes half the time.
        records.append(
            ConversionRecord(
                sequence,
                answered_ns + wall_offset_ns,
                answered_ns,
                request.vcpu,
                request.cause,
                request.gpa,
                request.size_bytes,
                ticket.came_from,
                request.to,
                outcome,
                ticket.merged if outcome is CONVERTED else 0,
                (ticket.started_ns or answered_ns) - ticket.arrived_ns,
                ticket.apply_ns,
                ticket.discard_ns,
            )
        )
    return records
