"""What the rules of conversion deal in: tickets on their way, the changes to be made, and why one failed."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from kvmd.conversion.messages import Answer, ConversionRequest
from kvmd.ranges import GpaRange, PageState
from kvmd.units import MIB


class ImplicitPolicy(enum.Enum):
    """What becomes of implicit conversions.

    They are not always meant: Linux's ``load_unaligned_zeropad`` touches the page after the one it reads, and where
    that one is a shared I/O page, converting it to private wipes what a device is just writing.
    """

    ALLOW = "allow"
    """Convert."""
    KEEP_EXPLICIT = "keep-explicit"
    """Convert, but for pages that the guest put into their state by an explicit conversion: stop the machine."""
    DENY = "deny"
    """Stop the machine: this guest is expected to ask."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a guest may ask of the host.

    Attributes:
        chunk_bytes: the most memory that one change converts, in bytes.
        no_progress: how often the same fault may come back with nothing changed before the machine stops.
        segments: the most intervals of page state: a guest that alternates pages pays with an error, not the
            host with memory.
        implicit: what becomes of implicit conversions.
    """

    chunk_bytes: int = 32 * MIB
    no_progress: int = 8
    segments: int = 65536
    implicit: ImplicitPolicy = ImplicitPolicy.ALLOW


def _nobody() -> None:
    """Wake nobody."""


class Ticket(msgspec.Struct, eq=False, gc=False):
    """One request on its way, and its answer once it is settled.

    Attributes:
        request: what was asked.
        wake: wakes who waits for the answer.
        arrived_ns: when it was handed in, on the monotonic clock; all times are for the record, not for the rules.
        range: the pages that were asked for; None where the request names none.
        answer: None until settled.
        came_from: the state before, or None where the range had several or none.
        merged: how many requests the change answered, 0 where there was none.
        started_ns: when its first change was begun; 0 for none.
        apply_ns: nanoseconds spent in changing attributes or slots.
        discard_ns: nanoseconds spent in discarding the side left behind.
        answered_ns: when it was answered.
    """

    request: ConversionRequest
    wake: Callable[[], object] = _nobody
    arrived_ns: int = 0
    range: GpaRange | None = None
    answer: Answer | None = None
    came_from: PageState | None = None
    merged: int = 0
    started_ns: int = 0
    apply_ns: int = 0
    discard_ns: int = 0
    answered_ns: int = 0


class Change(msgspec.Struct, frozen=True):
    """One change to make, of at most a chunk.

    Attributes:
        range: the pages; the first and the last of them change, some between may be in the state already.
        to: the state.
        explicit: by hypercall.
        discard_first: pages whose side that becomes live still holds old contents: they are discarded before
            it does, or the change fails.
        tickets: who asked, first come first.
        alone: the one fault that the whole change answers, where there is no other and nothing to be done for it
            besides: once the change is applied, its answer is ``DONE``, whatever the rules have still to note.
    """

    range: GpaRange
    to: PageState
    explicit: bool
    discard_first: tuple[GpaRange, ...]
    tickets: tuple[Ticket, ...]
    alone: Ticket | None = None


class FailureKind(enum.Enum):
    """Why a change could not be made, or only in part."""

    SLOTS = "memslots-exhausted"
    DISCARD_FIRST = "discard-failed"
    REFUSED = "backend-failed"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a change could not be made in whole.

    Attributes:
        kind: what the answer depends on.
        message: one line for the log, with the error number.
    """

    kind: FailureKind
    message: str
