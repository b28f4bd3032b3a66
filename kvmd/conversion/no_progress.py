"""Notices a fault that comes back although nothing changed: for ever, if nobody stops it.

The kernel advises user space to guard against it (Documentation/virt/kvm/api.rst, KVM_EXIT_MEMORY_FAULT).
"""

from __future__ import annotations

from kvmd.conversion.messages import IMPLICIT, ConversionRequest
from kvmd.ranges import PRIVATE, PageState
from kvmd.stop import Stop, StopReason

_NOTHING = (-1, PRIVATE, -1, 0)


class NoProgressWatch:
    """Remembers the last fault of each vCPU, and how often it came with the page's generation unchanged.

    Honest contention moves the generation: only a fault that no conversion can help comes back without.

    Args:
        limit: how often it may come back.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        # Of each vCPU the last fault: gpa, state it needed, generation of its answer, how often.
        self._seen: dict[int, tuple[int, PageState, int, int]] = {}

    def converted(self, request: ConversionRequest, generation: int) -> None:
        """Note that the fault was answered by change number ``generation``."""
        if request.cause is IMPLICIT and request.access is None:
            self._seen[request.vcpu] = (request.gpa, request.to, generation, 1)

    def spurious(self, request: ConversionRequest, generation: int) -> Stop | None:
        """Note a fault whose pages are in its state since change ``generation``; tell whether it is one too many."""
        if request.cause is not IMPLICIT or request.access is not None:
            return None  # it cannot come back: a hypercall returns, and an access that came as MMIO is made
        gpa, to, since, count = self._seen.get(request.vcpu, _NOTHING)
        if gpa != request.gpa or to is not request.to or generation > since:
            self._seen[request.vcpu] = (request.gpa, request.to, generation, 1)
            return None
        count += 1
        self._seen[request.vcpu] = (gpa, to, since, count)
        if count <= self._limit:
            return None
        state = request.to.value
        return Stop.because(
            StopReason.NO_PROGRESS,
            f"the same {state} fault came back {count} times with nothing changed: gpa {request.gpa:#x} size "
            f"{request.size_bytes:#x} is {state} already, and the access still fails",
            vcpu=request.vcpu,
        )
