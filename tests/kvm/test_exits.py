from __future__ import annotations

import ctypes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmd.hv.exits import (
    EmulationFailure,
    Exit,
    Halted,
    Hypercall,
    Mmio,
    PortIo,
    Shutdown,
    SystemEvent,
    UnexpectedExit,
)
from kvmd.kvm.exits import EXIT_NAMES, decode_exit, pending_read
from kvmd.kvm.run_page import KvmRun

PAGE = 4096


def decoded(run: KvmRun, data: bytes = b"") -> Exit:
    page = bytes(run).ljust(PAGE, b"\0") + data
    return decode_exit(run.exit_reason, page)


def io(direction: int, size: int, count: int) -> KvmRun:
    run = KvmRun(exit_reason=2)
    run.io.direction, run.io.size, run.io.count = direction, size, count
    run.io.port, run.io.data_offset = 0xCF8, PAGE
    return run


@pytest.mark.parametrize(("size", "count"), [(1, 1), (2, 1), (4, 1), (1, 3), (4, 1024)])
def test_out_takes_its_data_from_the_data_page(size: int, count: int) -> None:
    data = bytes(i % 251 for i in range(size * count))
    found = decoded(io(1, size, count), data + b"stale")
    assert found == PortIo(0xCF8, size, count, is_write=True, data=data)


def test_in_has_no_data_yet_and_says_where_it_goes() -> None:
    run = io(0, 2, 5)
    assert decoded(run, b"stale" * 4) == PortIo(0xCF8, 2, 5, is_write=False, data=b"")
    assert pending_read(2, bytes(run)) == (PAGE, 10)
    assert pending_read(2, bytes(io(1, 2, 5))) is None


@pytest.mark.parametrize("size", range(1, 9))
def test_mmio(size: int) -> None:
    run = KvmRun(exit_reason=6)
    run.mmio.phys_addr, run.mmio.len, run.mmio.is_write = 0xFEE0_0010, size, 1
    run.mmio.data[:] = range(1, 9)
    assert decoded(run) == Mmio(0xFEE0_0010, size, is_write=True, data=bytes(range(1, size + 1)))
    assert pending_read(6, bytes(run)) is None
    run.mmio.is_write = 0
    assert decoded(run) == Mmio(0xFEE0_0010, size, is_write=False, data=b"")
    assert pending_read(6, bytes(run)) == (40, size)


def test_hypercall() -> None:
    run = KvmRun(exit_reason=3)
    run.hypercall.nr = 12
    run.hypercall.args[:4] = (0x1000, 2**64 - 1, 0x10, 99)
    assert decoded(run) == Hypercall(12, (0x1000, 2**64 - 1, 0x10))
    assert pending_read(3, bytes(run)) is None


def test_exits_without_data() -> None:
    assert decoded(KvmRun(exit_reason=5)) == Halted()
    assert decoded(KvmRun(exit_reason=8)) == Shutdown()


def test_system_event() -> None:
    run = KvmRun(exit_reason=24)
    run.system_event.type = 2
    assert decoded(run) == SystemEvent(2)


def emulation_failure(ndata: int, flags: int, size: int) -> KvmRun:
    run = KvmRun(exit_reason=17)
    failure = run.emulation_failure
    failure.suberror, failure.ndata, failure.flags, failure.insn_size = 1, ndata, flags, size
    failure.insn_bytes[:] = range(0xA0, 0xAF)
    return run


def test_emulation_failure_tells_the_instruction() -> None:
    assert decoded(emulation_failure(4, 1, 3)) == EmulationFailure(bytes((0xA0, 0xA1, 0xA2)))
    assert decoded(emulation_failure(4, 1, 15)) == EmulationFailure(bytes(range(0xA0, 0xAF)))


@pytest.mark.parametrize(("ndata", "flags"), [(0, 1), (2, 1), (4, 0), (4, 2)])
def test_emulation_failure_without_valid_instruction_bytes(ndata: int, flags: int) -> None:
    assert decoded(emulation_failure(ndata, flags, 3)) == EmulationFailure(b"")


@given(st.integers(0, 255))
def test_an_instruction_is_never_longer_than_its_field(size: int) -> None:
    found = decoded(emulation_failure(4, 1, size))
    assert isinstance(found, EmulationFailure)
    assert len(found.instruction) == min(size, 15)


@pytest.mark.parametrize(
    ("suberror", "name"),
    [
        (2, "KVM_INTERNAL_ERROR_SIMUL_EX"),
        (3, "KVM_INTERNAL_ERROR_DELIVERY_EV"),
        (4, "KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON"),
        (9, "suberror 9"),
    ],
)
def test_other_internal_errors_show_their_data(suberror: int, name: str) -> None:
    run = KvmRun(exit_reason=17)
    run.internal.suberror, run.internal.ndata = suberror, 2
    run.internal.data[:2] = (0x10, 2**64 - 1)
    expected = f"{name} data[0]=0x10 data[1]=0xffffffffffffffff"
    assert decoded(run) == UnexpectedExit("KVM_EXIT_INTERNAL_ERROR", expected)


def test_internal_error_data_is_bounded_by_its_array() -> None:
    run = KvmRun(exit_reason=17)
    run.internal.suberror, run.internal.ndata = 3, 2**32 - 1
    found = decoded(run)
    assert isinstance(found, UnexpectedExit)
    assert found.detail.endswith("data[15]=0x0")


def test_fail_entry_and_unknown_tell_the_hardware_s_reason() -> None:
    run = KvmRun(exit_reason=9)
    run.fail_entry.hardware_entry_failure_reason, run.fail_entry.cpu = 0x8000_0021, 1
    assert decoded(run) == UnexpectedExit("KVM_EXIT_FAIL_ENTRY", "hardware_entry_failure_reason=0x80000021 cpu=1")
    run = KvmRun(exit_reason=0)
    run.hw.hardware_exit_reason = 0x77
    assert decoded(run) == UnexpectedExit("KVM_EXIT_UNKNOWN", "hardware_exit_reason=0x77")


HANDLED = {2, 3, 5, 6, 8, 17, 24}


@pytest.mark.parametrize("reason", sorted(EXIT_NAMES.keys() - HANDLED))
def test_every_other_exit_has_its_name(reason: int) -> None:
    found = decoded(KvmRun(exit_reason=reason))
    assert isinstance(found, UnexpectedExit)
    assert found.name == EXIT_NAMES[reason]
    assert found.detail


def test_an_exit_from_the_future_has_its_number() -> None:
    found = decoded(KvmRun(exit_reason=99))
    assert isinstance(found, UnexpectedExit)
    assert found.name == "exit reason 99"


@given(st.integers(0, 60), st.binary(min_size=256, max_size=256))
def test_no_content_of_the_union_trips_the_decoder(reason: int, union: bytes) -> None:
    page = bytearray(ctypes.sizeof(KvmRun))
    page[32:] = union
    decode_exit(reason, bytes(page).ljust(PAGE * 3, b"\0"))
    pending_read(reason, bytes(page))
