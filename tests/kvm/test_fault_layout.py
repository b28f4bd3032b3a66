from __future__ import annotations

import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmd.errors import ConfigError, MissingCapability
from kvmd.hv.exits import BadMemoryFault, FaultDefect, MemoryFault
from kvmd.kvm.fault_layout import EHWPOISON, LAYOUTS, MERGED, RFC_V9, FaultLayout, choose_layout
from kvmd.kvm.run_page import UNION_OFFSET

GPA, SIZE = 0x8000_0000_5000, 0x1000
U64 = st.integers(0, 2**64 - 1)
U32 = st.integers(0, 2**32 - 1)
ERRNO = st.sampled_from([0, errno.EFAULT, EHWPOISON, errno.ENOMEM, errno.EINVAL, errno.EIO])
REASON = st.sampled_from([0, 2, 6, 17, 38, 39, 40])


def merged_run(flags: int, gpa: int = GPA, size: int = SIZE) -> bytes:
    return bytes(UNION_OFFSET) + struct.pack("<QQQ", flags, gpa, size)


def rfc_run(flags: int, gpa: int = GPA, size: int = SIZE, padding: int = 0) -> bytes:
    return bytes(UNION_OFFSET) + struct.pack("<IIQQ", flags, padding, gpa, size)


@pytest.mark.parametrize(("flags", "private"), [(0, False), (8, True)])
def test_merged_fault(flags: int, private: bool) -> None:  # noqa: FBT001  parametrised
    found = MERGED.decode(-1, errno.EFAULT, 39, merged_run(flags))
    assert found == MemoryFault(GPA, SIZE, private)


@pytest.mark.parametrize("bit", [b for b in range(64) if b != 3])
@pytest.mark.parametrize("known", [0, 8])
def test_merged_unknown_flag_is_no_conversion(bit: int, known: int) -> None:
    flags = 1 << bit | known
    found = MERGED.decode(-1, errno.EFAULT, 39, merged_run(flags))
    assert found == BadMemoryFault(FaultDefect.UNKNOWN_FLAGS, GPA, SIZE, flags, errno.EFAULT)


@pytest.mark.parametrize("flags", [0, 8, 1])
@pytest.mark.parametrize(
    ("number", "defect"), [(EHWPOISON, FaultDefect.POISONED), (errno.ENOMEM, FaultDefect.OUT_OF_MEMORY)]
)
def test_merged_defects_tell_where(flags: int, number: int, defect: FaultDefect) -> None:
    found = MERGED.decode(-1, number, 39, merged_run(flags))
    assert found == BadMemoryFault(defect, GPA, SIZE, flags, number)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reason", [0, 6, 38])
def test_a_bare_fault_tells_nothing(layout: FaultLayout, reason: int) -> None:
    run = merged_run(8)
    assert layout.decode(-1, errno.EFAULT, reason, run) == BadMemoryFault(
        FaultDefect.NO_INFORMATION, None, None, None, errno.EFAULT
    )
    assert layout.decode(-1, EHWPOISON, reason, run) == BadMemoryFault(
        FaultDefect.POISONED, None, None, None, EHWPOISON
    )
    assert layout.decode(-1, errno.ENOMEM, reason, run) is None


@pytest.mark.parametrize("number", [errno.EINTR, errno.EAGAIN, errno.EINVAL, errno.EIO])
def test_merged_reason_is_stale_with_any_other_errno(number: int) -> None:
    assert MERGED.decode(-1, number, 39, merged_run(8)) is None


def test_merged_never_returns_a_fault_from_success() -> None:
    assert MERGED.decode(0, errno.EFAULT, 39, merged_run(8)) is None


@pytest.mark.parametrize(("flags", "private"), [(0, False), (1, True)])
def test_rfc_fault_ignores_padding(flags: int, private: bool) -> None:  # noqa: FBT001  parametrised
    found = RFC_V9.decode(0, errno.EINTR, 38, rfc_run(flags, padding=0xDEAD_BEEF))
    assert found == MemoryFault(GPA, SIZE, private)


@pytest.mark.parametrize("bit", range(1, 32))
def test_rfc_unknown_flag_is_no_conversion(bit: int) -> None:
    found = RFC_V9.decode(0, 0, 38, rfc_run(1 << bit | 1))
    assert found == BadMemoryFault(FaultDefect.UNKNOWN_FLAGS, GPA, SIZE, 1 << bit | 1, 0)


def test_each_layout_ignores_the_other_s_reason() -> None:
    assert MERGED.decode(0, 0, 38, rfc_run(1)) is None
    assert RFC_V9.decode(0, 0, 39, merged_run(8)) is None


@given(result=st.sampled_from([0, -1]), number=ERRNO, reason=REASON, flags=U64, gpa=U64, size=U64)
def test_merged_converts_only_what_it_fully_understands(
    result: int, number: int, reason: int, flags: int, gpa: int, size: int
) -> None:
    found = MERGED.decode(result, number, reason, merged_run(flags, gpa, size))
    convertible = (result, number, reason) == (-1, errno.EFAULT, 39) and flags in (0, 8)
    assert isinstance(found, MemoryFault) == convertible
    if isinstance(found, MemoryFault):
        assert found == MemoryFault(gpa, size, flags == 8)
    elif found is not None:
        assert result == -1
        assert found.errno == number
        assert (found.gpa is None) == (reason != 39)
    else:
        assert result == 0 or number not in (errno.EFAULT, EHWPOISON)


@given(result=st.sampled_from([0, -1]), number=ERRNO, reason=REASON, flags=U32, gpa=U64, size=U64)
def test_rfc_converts_only_what_it_fully_understands(
    result: int, number: int, reason: int, flags: int, gpa: int, size: int
) -> None:
    found = RFC_V9.decode(result, number, reason, rfc_run(flags, gpa, size))
    assert isinstance(found, MemoryFault) == ((result, reason) == (0, 38) and flags in (0, 1))
    if isinstance(found, MemoryFault):
        assert found == MemoryFault(gpa, size, flags == 1)


def test_the_kernel_s_capability_chooses() -> None:
    assert choose_layout(memory_fault_info=True) is MERGED
    assert choose_layout(memory_fault_info=False) is RFC_V9
    assert choose_layout(memory_fault_info=True, requested="merged") is MERGED
    assert choose_layout(memory_fault_info=False, requested="rfc-v9") is RFC_V9
    assert [layout.name for layout in LAYOUTS] == ["merged", "rfc-v9"]


def test_a_contradicted_request_is_refused() -> None:
    with pytest.raises(MissingCapability, match="needs KVM_CAP_MEMORY_FAULT_INFO") as caught:
        choose_layout(memory_fault_info=False, requested="merged")
    assert caught.value.capability == "KVM_CAP_MEMORY_FAULT_INFO"
    with pytest.raises(ConfigError, match="write 'merged'"):
        choose_layout(memory_fault_info=True, requested="rfc-v9")
    with pytest.raises(ConfigError, match="no fault layout 'v10': write one of 'merged', 'rfc-v9'"):
        choose_layout(memory_fault_info=True, requested="v10")
