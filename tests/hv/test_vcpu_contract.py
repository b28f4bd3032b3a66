"""What every vCPU does, whoever runs it."""

from __future__ import annotations

import ctypes
import random
import struct
import threading
from dataclasses import replace
from functools import partial

import pytest

from kvmd.hv.exits import Exit, Halted, Interrupted, MemoryFault, Mmio, PortIo, Shutdown
from kvmd.hv.vcpu import Registers, Vcpu
from tests.fakes import FakeVcpu
from tests.hv.conftest import CODE, TRIPPED, Bench

SPIN = b"\xeb\xfe"  # jmp $
IN_THEN_OUT = b"\xe4\x11\xe6\x12"  # in al, 0x11; out 0x12, al
LOST_AFTER_S = 20.0


def out(port: int, data: bytes) -> PortIo:
    return PortIo(port, len(data), 1, is_write=True, data=data)


def take_in(port: int, size: int = 1) -> PortIo:
    return PortIo(port, size, 1, is_write=False, data=b"")


def fake_in_then_out(vcpu: FakeVcpu) -> Exit:
    return take_in(0x11) if vcpu.read is None else out(0x12, vcpu.read)


def fake_spin(vcpu: FakeVcpu) -> Exit:
    return vcpu.spin()


# --- every kind, the fake too


def test_a_read_is_answered_and_the_guest_goes_on(any_bench: Bench) -> None:
    vcpu = any_bench.start(IN_THEN_OUT, guest=fake_in_then_out)
    vcpu.prepare_thread()
    assert vcpu.run() == take_in(0x11)
    vcpu.complete_read(b"z")
    assert vcpu.run() == out(0x12, b"z")
    vcpu.release_thread()


def test_a_request_before_the_first_run_is_kept_until_it_is_cleared(any_bench: Bench) -> None:
    vcpu = any_bench.start(SPIN, guest=fake_spin)
    vcpu.prepare_thread()
    vcpu.request_exit()
    assert vcpu.run() == Interrupted()
    assert vcpu.run() == Interrupted()
    vcpu.clear_exit_request()
    vcpu.release_thread()


def test_a_pending_read_is_completed_before_a_request_is_honoured(any_bench: Bench) -> None:
    vcpu = any_bench.start(IN_THEN_OUT, guest=fake_in_then_out)
    vcpu.prepare_thread()
    vcpu.run()
    vcpu.complete_read(b"z")
    vcpu.request_exit()
    assert vcpu.run() == Interrupted()
    vcpu.clear_exit_request()
    assert vcpu.run() == out(0x12, b"z")
    vcpu.release_thread()


def test_registers_read_back_as_written(any_bench: Bench) -> None:
    vcpu = any_bench.start(SPIN, guest=fake_spin)
    names = [name for name in Registers.__slots__ if name not in ("rip", "rflags")]
    values = Registers(**{name: 2**63 + i for i, name in enumerate(names)}, rip=CODE, rflags=0x3202)
    vcpu.set_registers(values)
    assert vcpu.registers() == values


def test_no_kick_of_a_storm_is_lost(any_bench: Bench) -> None:
    """A guest that spins is kicked out 300 times, at random moments, each time for a command of its own."""
    vcpu = any_bench.start(SPIN, guest=fake_spin)
    wanted, seen = 0, 0
    changed = threading.Condition()
    strangers: list[Exit] = []

    def is_seen(number: int) -> bool:
        return seen >= number

    def serve() -> None:
        nonlocal seen
        vcpu.prepare_thread()
        while seen < 300:
            exit_ = vcpu.run()
            if exit_ != Interrupted():
                strangers.append(exit_)
                break
            vcpu.clear_exit_request()
            with changed:
                seen = wanted
                changed.notify_all()
        vcpu.release_thread()

    thread = threading.Thread(target=serve)
    thread.start()
    moments = random.Random(4)  # noqa: S311 - moments, not secrets
    for number in range(1, 301):
        threading.Event().wait(moments.random() * 2e-4)
        with changed:
            wanted = number
        vcpu.request_exit()
        with changed:
            assert changed.wait_for(partial(is_seen, number), LOST_AFTER_S), f"kick {number} was lost"
    thread.join()
    assert strangers == []


# --- ports


@pytest.mark.parametrize("cpl", [0, 3])
@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (b"\xe6\x10", b"\x44"),  # out 0x10, al
        (b"\x66\xe7\x10", b"\x44\x33"),  # out 0x10, ax
        (b"\xe7\x10", b"\x44\x33\x22\x11"),  # out 0x10, eax
    ],
)
def test_out_of_every_width(bench: Bench, code: bytes, expected: bytes, cpl: int) -> None:
    assert bench.start(code, cpl=cpl, rax=0x1122_3344).run() == out(0x10, expected)


@pytest.mark.parametrize(
    ("code", "data", "rax"),
    [
        (b"\xe4\x11", b"z", 0xFFFF_FFFF_FFFF_FF7A),
        (b"\x66\xe5\x11", b"yz", 0xFFFF_FFFF_FFFF_7A79),
        (b"\xe5\x11", b"wxyz", 0x7A79_7877),  # 32 bits clear the upper half
    ],
)
def test_in_of_every_width(bench: Bench, code: bytes, data: bytes, rax: int) -> None:
    vcpu = bench.start(code + b"\xe6\x12", rax=(1 << 64) - 1)
    assert vcpu.run() == take_in(0x11, len(data))
    vcpu.complete_read(data)
    assert vcpu.run() == out(0x12, data[:1])
    assert vcpu.registers().rax == rax


def test_flags_live_through_a_port_access(bench: Bench) -> None:
    # xor ecx, ecx; out 0x10, al; setz al; out 0x11, al
    vcpu = bench.start(bytes.fromhex("31c9 e610 0f94c0 e611"), rax=0x40)
    assert vcpu.run() == out(0x10, b"\x40")
    assert vcpu.run() == out(0x11, b"\x01")


def test_nothing_after_an_out_is_executed_before_it_is_answered(bench: Bench) -> None:
    # out 0x10, al; inc rbx; inc rbx; out 0x11, al
    vcpu = bench.start(bytes.fromhex("e610 48ffc3 48ffc3 e611"))
    vcpu.run()
    assert vcpu.registers().rbx == 0
    vcpu.run()
    assert vcpu.registers().rbx == 2


def test_rep_outsb_brings_all_of_its_data(bench: Bench) -> None:
    text = b"shared or private?"
    ctypes.memmove(bench.ram + 0x20000, text, len(text))
    # mov esi, 0x20000; mov ecx, length; mov edx, 0x3f8; rep outsb; out 0x12, al
    vcpu = bench.start(struct.pack("<BIBIBI", 0xBE, 0x20000, 0xB9, len(text), 0xBA, 0x3F8) + b"\xf3\x6e\xe6\x12")
    found = b""
    while (exit_ := vcpu.run()) != out(0x12, b"\0"):
        assert isinstance(exit_, PortIo)
        assert (exit_.port, exit_.size, len(exit_.data)) == (0x3F8, 1, exit_.count)
        found += exit_.data
    assert found == text
    assert vcpu.registers().rcx == 0


@pytest.mark.parametrize(("code", "size"), [(b"\xf3\x6c", 1), (b"\xf3\x66\x6d", 2), (b"\xf3\x6d", 4)])
def test_rep_ins_stores_all_of_its_data(bench: Bench, code: bytes, size: int) -> None:
    # mov edi, 0x20ffe; mov ecx, 3; mov edx, 0x60; rep ins; out 0x12, al: the second lies over the border of pages
    vcpu = bench.start(struct.pack("<BIBIBI", 0xBF, 0x20FFE, 0xB9, 3, 0xBA, 0x60) + code + b"\xe6\x12")
    given = bytearray(b"hello, world"[: 3 * size])
    while (exit_ := vcpu.run()) != out(0x12, b"\0"):
        assert isinstance(exit_, PortIo)
        assert (exit_.size, exit_.is_write) == (size, False)
        vcpu.complete_read(bytes(given[: exit_.count * size]))
        del given[: exit_.count * size]
    assert ctypes.string_at(bench.ram + 0x20FFE, 3 * size) == b"hello, world"[: 3 * size]
    assert vcpu.registers().rdi == 0x20FFE + 3 * size


def test_a_single_ins_goes_on_behind_itself_and_downwards_too(bench: Bench) -> None:
    # std; mov edi, 0x20000; insb; out 0x12, al
    vcpu = bench.start(bytes.fromhex("fd bf00000200 6c e612"))
    assert vcpu.run() == take_in(0)
    vcpu.complete_read(b"q")
    assert vcpu.run() == out(0x12, b"\0")
    assert ctypes.string_at(bench.ram + 0x20000, 1) == b"q"
    assert vcpu.registers().rdi == 0x1FFFF


# --- memory


def test_a_load_and_a_store_where_nothing_is(bench: Bench) -> None:
    # mov [0x200000], eax; mov eax, [0x200004]; out 0x12, eax
    vcpu = bench.start(bytes.fromhex("89042500002000 8b042504002000 e712"), rax=0x1122_3344)
    assert vcpu.run() == Mmio(0x200000, 4, is_write=True, data=b"\x44\x33\x22\x11")
    assert vcpu.run() == Mmio(0x200004, 4, is_write=False, data=b"")
    vcpu.complete_read(b"abcd")
    assert vcpu.run() == out(0x12, b"abcd")


def test_an_addition_where_nothing_is_loads_and_stores_once(bench: Bench) -> None:
    # add [0x200010], eax; setc al; out 0x12, al
    vcpu = bench.start(bytes.fromhex("01042510002000 0f92c0 e612"), rax=2)
    assert vcpu.run() == Mmio(0x200010, 4, is_write=False, data=b"")
    vcpu.complete_read(b"\xff\xff\xff\xff")
    assert vcpu.run() == Mmio(0x200010, 4, is_write=True, data=b"\x01\0\0\0")
    assert vcpu.run() == out(0x12, b"\x01")


def test_a_request_waits_for_a_load_to_be_completed(bench: Bench) -> None:
    # mov eax, [0x200004]; out 0x12, eax
    vcpu = bench.start(bytes.fromhex("8b042504002000 e712"))
    vcpu.prepare_thread()
    vcpu.run()
    vcpu.complete_read(b"abcd")
    vcpu.request_exit()
    assert vcpu.run() == Interrupted()
    assert vcpu.registers().rax == int.from_bytes(b"abcd", "little")
    vcpu.clear_exit_request()
    assert vcpu.run() == out(0x12, b"abcd")


def test_a_view_that_is_not_live_faults_once_and_is_tried_again(bench: Bench) -> None:
    bench.require_tripwire()
    # mov ebx, TRIPPED + 0x25123; lock inc dword [rbx]; mov eax, [rbx]; out 0x12, eax
    vcpu = bench.start(struct.pack("<BI", 0xBB, TRIPPED + 0x25123) + bytes.fromhex("f0ff03 8b03 e712"))
    for _ in range(2):
        found = vcpu.run()
        assert isinstance(found, MemoryFault)
        assert (found.gpa, found.size) == (1 << bench.c_bit | 0x25000, 0x1000)
        assert vcpu.registers().rip == CODE + 5
    bench.make_private_live()
    assert vcpu.run() == out(0x12, b"\x01\0\0\0")


def test_translation_follows_the_guests_tables(bench: Bench) -> None:
    vcpu = bench.start(SPIN)
    assert vcpu.translate(0x12345) == 0x12345
    assert vcpu.translate(TRIPPED + 0x123) == 1 << bench.c_bit | 0x123
    assert vcpu.translate(0x8000_0000) is None


# --- exceptions


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("0f0b", id="ud2"),
        pytest.param("06", id="not in 64-bit mode"),
        pytest.param("f0ffc0", id="lock of a register"),
        pytest.param("cc", id="int3"),
        pytest.param("cd80", id="int 0x80"),
        pytest.param("31c9 f7f1", id="division by zero"),
        pytest.param("f4", id="hlt"),
        pytest.param("0f30", id="wrmsr"),
        pytest.param("0f22d8", id="mov cr3"),
        pytest.param("48cf", id="iretq"),
        pytest.param("0f01f8", id="swapgs"),
        pytest.param("8b042500000080", id="load that no table maps"),
        pytest.param("48b80000000000800000 ffe0", id="jump to no canonical address"),
        pytest.param("9c 810c2400010000 9d 90 90", id="single step"),
    ],
)
def test_any_exception_of_a_user_is_a_triple_fault(bench: Bench, code: str) -> None:
    assert bench.start(bytes.fromhex(code)).run() == Shutdown()


def test_halt_of_the_kernel_level(bench: Bench) -> None:
    assert bench.start(b"\xf4", cpl=0).run() == Halted()


def test_the_guest_sees_its_own_apic_id(bench: Bench) -> None:
    # At the kernel level: at CPL 3 a page-table based KVM lets the host's processor answer, unless that can fault.
    # mov eax, 1; cpuid; mov eax, ebx; shr eax, 24; out 0x12, al
    asking = bytes.fromhex("b801000000 0fa2 89d8 c1e818 e612")
    assert bench.start(asking, index=5, cpl=0).run() == out(0x12, b"\x05")


# --- misuse


def test_what_is_completed_must_be_pending(bench: Bench) -> None:
    vcpu = bench.start(IN_THEN_OUT)
    with pytest.raises(ValueError, match="no pending read"):
        vcpu.complete_read(b"z")
    with pytest.raises(ValueError, match="no pending hypercall"):
        vcpu.complete_hypercall(0)
    with pytest.raises(ValueError, match="one of"):
        vcpu.complete_hypercall(-22)
    vcpu.run()
    with pytest.raises(ValueError, match="takes 1 bytes, not 2"):
        vcpu.complete_read(b"zz")
    vcpu.complete_read(b"z")
    vcpu.run()
    with pytest.raises(ValueError, match="no pending read"):
        vcpu.complete_read(b"z")


def test_a_vcpu_belongs_to_one_thread(bench: Bench) -> None:
    vcpu = bench.start(SPIN)
    vcpu.prepare_thread()
    problems: list[str] = []

    def use() -> None:
        for action in (vcpu.prepare_thread, vcpu.release_thread):
            with pytest.raises(RuntimeError) as raised:
                action()
            problems.append(str(raised.value))

    other = threading.Thread(target=use)
    other.start()
    other.join()
    assert problems == [
        "vCPU 0 is already run by another thread",
        "vCPU 0 is run by another thread, which has to release it",
    ]
    vcpu.release_thread()
    vcpu.release_thread()


def test_a_closed_vcpu_says_so(bench: Bench) -> None:
    vcpu: Vcpu = bench.start(SPIN)
    vcpu.close()
    vcpu.close()
    vcpu.request_exit()  # a late kick is harmless
    for use in (vcpu.run, vcpu.registers, vcpu.prepare_thread, lambda: vcpu.complete_read(b"z")):
        with pytest.raises(ValueError, match="vCPU 0 is used after it was closed"):
            use()


def test_a_privilege_level_is_0_or_3(bench: Bench) -> None:
    with pytest.raises(ValueError, match="0 or 3, not 1"):
        bench.start(SPIN, cpl=1)


def test_registers_may_be_changed_in_between(bench: Bench) -> None:
    vcpu = bench.start(b"\xe6\x10\xe6\x11")
    vcpu.run()
    vcpu.set_registers(replace(vcpu.registers(), rax=0x55))
    assert vcpu.run() == out(0x11, b"\x55")
