"""What a vCPU asks of the conversion service, and what it is told: frozen and complete.

These are msgspec structs, like all messages that a conversion makes: a frozen dataclass takes five times as long to
create, which adds up to some ten microseconds a conversion.
"""

from __future__ import annotations

import enum
from typing import Final

import msgspec

from kvmd.ranges import PageState
from kvmd.stop import Stop


class Cause(enum.Enum):
    """What made a conversion: an access in the wrong state, or a request by hypercall."""

    IMPLICIT = "implicit"
    EXPLICIT = "explicit"


IMPLICIT: Final = Cause.IMPLICIT
EXPLICIT: Final = Cause.EXPLICIT
"""The two for what every conversion runs through: see ``kvmd.ranges.PRIVATE``."""


class Outcome(enum.Enum):
    """How a request for a conversion ended."""

    CONVERTED = "converted"
    """The range changed its state for this request."""
    SPURIOUS = "spurious"
    """It was in that state already: nothing was done, nothing discarded."""
    STALE = "stale"
    """An explicit conversion overtook the fault: nothing was done, the guest tries again."""
    REFUSED = "refused"
    """The request cannot be meant; a hypercall gets EINVAL."""
    FAILED = "failed"
    """The host could not do it; a hypercall gets EAGAIN, a fault stops the machine."""


CONVERTED: Final = Outcome.CONVERTED
"""The one for what every conversion runs through: see ``kvmd.ranges.PRIVATE``."""


class GuestResult(enum.IntEnum):
    """What an explicit request returns: the only values that KVM passes on (api.rst, KVM_EXIT_HYPERCALL)."""

    SUCCESS = 0
    EAGAIN = 11
    EINVAL = 22


class MmioAccess(msgspec.Struct, frozen=True):
    """A data access that KVM could not make itself: the service makes it, once the page is in its state.

    Attributes:
        gpa: address in bytes, without the C-bit; within one page.
        size: 1 to 8 bytes.
        data: what a store writes, or None for a load.
    """

    gpa: int
    size: int
    data: bytes | None


class ConversionRequest(msgspec.Struct, frozen=True, gc=False):
    """A request as it came from the guest: nothing in it has been checked.

    Attributes:
        vcpu: index of the vCPU that waits for the answer.
        cause: implicit or explicit.
        gpa: start in bytes, without the C-bit.
        size_bytes: length in bytes.
        to: the state that the guest needs, or asks for.
        entered_at: the machine's change sequence before the KVM_RUN that ended in this request.
        valid: false where an explicit request was malformed in a way that gpa and size cannot show.
        access: for an implicit request that arrived as MMIO, the access to be made.
    """

    vcpu: int
    cause: Cause
    gpa: int
    size_bytes: int
    to: PageState
    entered_at: int
    valid: bool = True
    access: MmioAccess | None = None


class Answer(msgspec.Struct, frozen=True):
    """The answer to one request.

    Attributes:
        outcome: how it ended.
        result: what a hypercall returns.
        data: what an ``access`` that loads read.
        stop: why the machine stops, where it does: the vCPU must not enter the guest again.
    """

    outcome: Outcome
    result: GuestResult = GuestResult.SUCCESS
    data: bytes = b""
    stop: Stop | None = None


DONE: Final = Answer(CONVERTED)
"""What nearly every request is told."""
