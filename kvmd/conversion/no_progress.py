"""Notices a fault that comes back although nothing changed: for ever, if nobody stops it.

The kernel advises user space to guard against it (Documentation/virt/kvm/api.rst, KVM_EXIT_MEMORY_FAULT).
"""

from __future__ import annotations

from dataclasses import dataclass

from kvmd.conversion.messages import Cause, ConversionRequest
from kvmd.ranges import PageState
from kvmd.stop import Stop, StopReason


@dataclass(slots=True)
class _Seen:
    """The last answer to a fault of one vCPU."""

    gpa: int = -1
    to: PageState = PageState.PRIVATE
    generation: int = -1
    count: int = 0


class NoProgressWatch:
    """Remembers the last fault of each vCPU, and how often it came with the page's generation unchanged.

    Honest contention moves the generation: only a fault that no conversion can help comes back without.

    Args:
        limit: how often it may come back.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._seen: dict[int, _Seen] = {}

    def converted(self, request: ConversionRequest, generation: int) -> None:
        """Note that the fault was answered by change number ``generation``."""
        if _counts(request):
            seen = self._of(request.vcpu)
            seen.gpa, seen.to, seen.generation, seen.count = request.gpa, request.to, generation, 1

    def spurious(self, request: ConversionRequest, generation: int) -> Stop | None:
        """Note a fault whose pages are in its state since change ``generation``; tell whether it is one too many."""
        if not _counts(request):
            return None
        seen = self._of(request.vcpu)
        if (seen.gpa, seen.to) == (request.gpa, request.to) and generation <= seen.generation:
            seen.count += 1
        else:
            seen.gpa, seen.to, seen.generation, seen.count = request.gpa, request.to, generation, 1
        if seen.count <= self._limit:
            return None
        state = request.to.value
        return Stop.because(
            StopReason.NO_PROGRESS,
            f"the same {state} fault came back {seen.count} times with nothing changed: gpa {request.gpa:#x} size "
            f"{request.size_bytes:#x} is {state} already, and the access still fails",
            vcpu=request.vcpu,
        )

    def _of(self, vcpu: int) -> _Seen:
        seen = self._seen.get(vcpu)
        if seen is None:
            seen = self._seen[vcpu] = _Seen()
        return seen


def _counts(request: ConversionRequest) -> bool:
    """Tell whether the request can come back: an access that came as MMIO is made, a hypercall returns."""
    return request.cause is Cause.IMPLICIT and request.access is None
