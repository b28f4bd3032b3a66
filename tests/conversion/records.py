"""A conversion record to start from."""

from __future__ import annotations

from kvmd.conversion.messages import Cause, Outcome
from kvmd.conversion.record import ConversionRecord
from kvmd.ranges import PageState
from kvmd.units import PAGE_SIZE

RECORD = ConversionRecord(
    sequence=1,
    wall_ns=0,
    monotonic_ns=1_000_000_000,
    vcpu=0,
    cause=Cause.IMPLICIT,
    gpa=0x5000,
    size_bytes=PAGE_SIZE,
    came_from=PageState.PRIVATE,
    to=PageState.SHARED,
    outcome=Outcome.CONVERTED,
    merged=1,
    waiting_ns=10000,
    applying_ns=100000,
    discarding_ns=1000,
)
"""One page, converted to shared for a fault."""
