from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmd.conversion.hypercall import KVM_HC_MAP_GPA_RANGE, explicit_request
from kvmd.conversion.messages import Cause, ConversionRequest
from kvmd.ranges import PageState
from kvmd.units import PAGE_SIZE

u64 = st.integers(0, (1 << 64) - 1)


def test_the_number_is_kvm_s() -> None:
    assert KVM_HC_MAP_GPA_RANGE == 12


def test_the_arguments_are_gpa_pages_and_attributes() -> None:
    assert explicit_request(3, (0x5000, 2, 1 << 4), 77) == ConversionRequest(
        vcpu=3,
        cause=Cause.EXPLICIT,
        gpa=0x5000,
        size_bytes=2 * PAGE_SIZE,
        to=PageState.PRIVATE,
        entered_at=77,
        valid=True,
        access=None,
    )


@pytest.mark.parametrize(
    ("attributes", "to", "valid"),
    [
        (0, PageState.SHARED, True),
        (1 << 4, PageState.PRIVATE, True),
        # The 2 MiB request to shared of an SNP guest: a page size hint alone does not make it private.
        (1, PageState.SHARED, True),
        (0xF, PageState.SHARED, True),
        (0x1F, PageState.PRIVATE, True),
        (1 << 5, PageState.SHARED, False),
        (1 << 4 | 1 << 63, PageState.PRIVATE, False),
        ((1 << 64) - 1, PageState.PRIVATE, False),
    ],
)
def test_the_private_bit_decides_and_reserved_bits_are_refused(attributes: int, to: PageState, valid: bool) -> None:  # noqa: FBT001  a parameter
    request = explicit_request(0, (0, 1, attributes), 0)
    assert (request.to, request.valid) == (to, valid)


@given(vcpu=st.integers(0, 63), gpa=u64, pages=u64, attributes=u64, entered_at=st.integers(0))
def test_any_arguments_make_a_request_that_says_what_they_say(
    vcpu: int, gpa: int, pages: int, attributes: int, entered_at: int
) -> None:
    request = explicit_request(vcpu, (gpa, pages, attributes), entered_at)
    assert (request.vcpu, request.cause, request.entered_at) == (vcpu, Cause.EXPLICIT, entered_at)
    assert request.gpa == gpa
    # Nothing is cut to 64 bits: a count that overflows must not come to look like a small one.
    assert request.size_bytes == pages * PAGE_SIZE
    assert request.to is (PageState.PRIVATE if attributes >> 4 & 1 else PageState.SHARED)
    assert request.valid == (attributes < 1 << 5)
    assert request.access is None
