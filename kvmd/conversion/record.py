"""The record of one answered request: what the conversion log, the counters and the stream are made of."""

from __future__ import annotations

import msgspec

from kvmd.conversion.messages import Cause, Outcome
from kvmd.ranges import PageState


class ConversionRecord(msgspec.Struct, frozen=True, gc=False):
    """One answered request for a conversion.

    Attributes:
        sequence: the record's number in its machine, from 1, without gaps.
        wall_ns: wall-clock time of the answer, in nanoseconds since the epoch.
        monotonic_ns: the same on the monotonic clock.
        vcpu: index of the vCPU that asked.
        cause: implicit or explicit.
        gpa: start in bytes, without the C-bit.
        size_bytes: length in bytes, as asked.
        came_from: the state before, or None where the range was not all in one state.
        to: the state asked for.
        outcome: how it ended.
        merged: how many requests the same change answered (1: this one alone; 0: there was no change).
        waiting_ns: nanoseconds from the vCPU's exit to the start of the change, or to the answer.
        applying_ns: nanoseconds in changing attributes or slots.
        discarding_ns: nanoseconds in discarding the side left behind.
    """

    sequence: int
    wall_ns: int
    monotonic_ns: int
    vcpu: int
    cause: Cause
    gpa: int
    size_bytes: int
    came_from: PageState | None
    to: PageState
    outcome: Outcome
    merged: int
    waiting_ns: int
    applying_ns: int
    discarding_ns: int
