"""KVM_HC_MAP_GPA_RANGE: how a guest asks for an explicit conversion.

Source: Documentation/virt/kvm/x86/hypercalls.rst, 8. KVM_HC_MAP_GPA_RANGE.
"""

from __future__ import annotations

from kvmd.conversion.messages import Cause, ConversionRequest
from kvmd.ranges import PageState
from kvmd.units import PAGE_SIZE

KVM_HC_MAP_GPA_RANGE = 12
_PRIVATE = 1 << 4
_RESERVED = ~0x1F
"""Bits 63:5 of the attributes. Bits 3:0 are a page-size hint, which KVM passes on and nobody has to heed."""


def explicit_request(vcpu: int, arguments: tuple[int, int, int], entered_at: int) -> ConversionRequest:
    """Return the request that the three arguments make: gpa, count of 4 KiB pages, attributes.

    Nothing is checked here but the attributes: Python's integers do not overflow, and the rules know the memory.
    """
    gpa, pages, attributes = arguments
    return ConversionRequest(
        vcpu=vcpu,
        cause=Cause.EXPLICIT,
        gpa=gpa,
        size_bytes=pages * PAGE_SIZE,
        # The private bit alone: an SNP guest's 2 MiB request to shared has a hint and is not zero either.
        to=PageState.PRIVATE if attributes & _PRIVATE else PageState.SHARED,
        entered_at=entered_at,
        valid=not attributes & _RESERVED,
    )
