from __future__ import annotations

import ctypes
import errno
import signal
import struct
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn

import pytest

from kvmd.errors import BackendError
from kvmd.hv.exits import EmulationFailure, Halted, Hypercall, Interrupted, Mmio, PortIo, Shutdown
from kvmd.hv.vcpu import Registers, Vcpu
from kvmd.kvm import uapi
from kvmd.kvm import vcpu as subject
from kvmd.kvm.fault_layout import MERGED
from kvmd.kvm.run_page import EXIT_REASON_OFFSET, KvmRun
from kvmd.kvm.vcpu import KICK_SIGNAL, KvmVcpu
from kvmd.kvm.vm import Vm

pytestmark = pytest.mark.kvm

Boot = Callable[..., KvmVcpu]

IN_THEN_OUT = b"\xe4\x11\xe6\x12"  # in al, 0x11; out 0x12, al


def out(port: int, data: bytes) -> PortIo:
    return PortIo(port, len(data), 1, is_write=True, data=data)


def test_it_is_a_vcpu(boot: Boot) -> None:
    vcpu: Vcpu = boot(b"\xf4", index=0)
    assert vcpu.index == 0


@pytest.mark.parametrize("cpl", [0, 3])
def test_in_and_out(boot: Boot, cpl: int) -> None:
    vcpu = boot(b"\xe6\x10" + IN_THEN_OUT, cpl=cpl, rax=0x41)
    assert vcpu.run() == out(0x10, b"A")
    assert vcpu.run() == PortIo(0x11, 1, 1, is_write=False, data=b"")
    vcpu.complete_read(b"z")
    assert vcpu.run() == out(0x12, b"z")


def test_wide_out(boot: Boot) -> None:
    vcpu = boot(b"\xe7\x10", rax=0x1122_3344)  # out 0x10, eax
    assert vcpu.run() == out(0x10, b"\x44\x33\x22\x11")


def test_rep_outsb_comes_with_all_of_its_data(boot: Boot, ram: int) -> None:
    text = b"shared or private?"
    ctypes.memmove(ram + 0x20000, text, len(text))
    # mov esi, 0x20000; mov ecx, length; mov edx, 0x3f8; rep outsb; out 0x12, al
    code = struct.pack("<BIBIBI", 0xBE, 0x20000, 0xB9, len(text), 0xBA, 0x3F8) + b"\xf3\x6e\xe6\x12"
    vcpu = boot(code)
    found = b""
    counts = []
    while (exit_ := vcpu.run()) != out(0x12, b"\0"):
        assert isinstance(exit_, PortIo)
        assert (exit_.port, exit_.size, len(exit_.data)) == (0x3F8, 1, exit_.count)
        found += exit_.data
        counts.append(exit_.count)
    assert found == text
    assert sum(counts) == len(text)


def test_rep_insb_takes_all_of_its_data(boot: Boot, ram: int) -> None:
    # mov edi, 0x20000; mov ecx, 5; mov edx, 0x60; rep insb; out 0x12, al
    code = struct.pack("<BIBIBI", 0xBF, 0x20000, 0xB9, 5, 0xBA, 0x60) + b"\xf3\x6c\xe6\x12"
    vcpu = boot(code)
    given = bytearray(b"hello")
    while (exit_ := vcpu.run()) != out(0x12, b"\0"):
        assert isinstance(exit_, PortIo)
        assert not exit_.is_write
        vcpu.complete_read(bytes(given[: exit_.count]))
        del given[: exit_.count]
    assert ctypes.string_at(ram + 0x20000, 5) == b"hello"


def test_mmio_load_and_store(boot: Boot) -> None:
    # mov [0x200000], eax; mov eax, [0x200004]; out 0x12, eax
    vcpu = boot(bytes.fromhex("89042500002000 8b042504002000 e712"), rax=0x1122_3344)
    assert vcpu.run() == Mmio(0x200000, 4, is_write=True, data=b"\x44\x33\x22\x11")
    assert vcpu.run() == Mmio(0x200004, 4, is_write=False, data=b"")
    vcpu.complete_read(b"abcd")
    assert vcpu.run() == out(0x12, b"abcd")


def test_a_read_takes_just_its_length_and_must_be_pending(boot: Boot) -> None:
    vcpu = boot(IN_THEN_OUT)
    with pytest.raises(ValueError, match="no pending read"):
        vcpu.complete_read(b"z")
    vcpu.run()
    with pytest.raises(ValueError, match="takes 1 bytes, not 2"):
        vcpu.complete_read(b"zz")
    vcpu.complete_read(b"z")
    vcpu.run()
    with pytest.raises(ValueError, match="no pending read"):
        vcpu.complete_read(b"z")


def test_a_hypercall_takes_only_results_that_kvm_can_take(boot: Boot) -> None:
    vcpu = boot(b"\xf4")
    with pytest.raises(ValueError, match="no pending hypercall"):
        vcpu.complete_hypercall(0)
    with pytest.raises(ValueError, match="one of"):
        vcpu.complete_hypercall(-22)
    struct.pack_into("=I", vcpu._run, EXIT_REASON_OFFSET, 3)
    for result in (0, errno.EINVAL, errno.EAGAIN):
        vcpu.complete_hypercall(result)
        assert KvmRun.from_buffer_copy(vcpu._run).hypercall.ret == result


def test_hypercall_of_the_kernel_level(vm: Vm, boot: Boot) -> None:
    bit = 1 << uapi.KVM_HC_MAP_GPA_RANGE
    if not vm.check_extension(uapi.KVM_CAP_EXIT_HYPERCALL) & bit:
        pytest.skip("KVM_CAP_EXIT_HYPERCALL without KVM_HC_MAP_GPA_RANGE")
    vm.enable_capability(uapi.KVM_CAP_EXIT_HYPERCALL, bit)
    # mov eax, 12; mov ebx, 0x5000; mov ecx, 1; mov edx, 0x10; vmcall; out 0x12, eax
    vcpu = boot(bytes.fromhex("b80c000000 bb00500000 b901000000 ba10000000 0f01c1 e712"), cpl=0)
    vcpu.prepare_thread()
    # A page-table based KVM patches the instruction for ever where it emulates the kernel level.
    deadline = threading.Timer(0.5, vcpu.request_exit)
    deadline.start()
    found = vcpu.run()
    deadline.cancel()
    deadline.join()
    vcpu.clear_exit_request()
    if found == Interrupted():
        pytest.skip("this KVM never completes a VMCALL of the kernel level")
    assert found == Hypercall(12, (0x5000, 1, 0x10))
    vcpu.complete_hypercall(errno.EAGAIN)
    while (found := vcpu.run()) == Interrupted():  # the deadline may have passed meanwhile
        pass
    assert found == out(0x12, b"\x0b\0\0\0")


def test_halt_of_the_kernel_level(boot: Boot) -> None:
    assert boot(b"\xf4", cpl=0).run() == Halted()


def test_any_exception_is_a_triple_fault(boot: Boot) -> None:
    assert boot(b"\x0f\x0b").run() == Shutdown()


def test_an_instruction_that_cannot_be_emulated_is_told(vm: Vm, boot: Boot) -> None:
    if not vm.check_extension(uapi.KVM_CAP_EXIT_ON_EMULATION_FAILURE):
        pytest.skip("no KVM_CAP_EXIT_ON_EMULATION_FAILURE")
    vm.enable_capability(uapi.KVM_CAP_EXIT_ON_EMULATION_FAILURE, 1)
    instruction = bytes.fromhex("660ffc0425 00002000")  # paddb xmm0, [0x200000]
    found = boot(instruction).run()
    assert isinstance(found, EmulationFailure)
    assert found.instruction[: len(instruction)] == instruction


def test_registers_read_back_as_written(boot: Boot) -> None:
    vcpu = boot(b"\xf4")
    names = [name for name in Registers.__slots__ if name not in ("rip", "rflags")]
    values = Registers(**{name: 2**63 + i for i, name in enumerate(names)}, rip=0x10000, rflags=0x3202)
    vcpu.set_registers(values)
    assert vcpu.registers() == values
    assert names[0] == "rax"
    assert names[-1] == "r15"


def test_the_guest_sees_its_own_apic_id(boot: Boot) -> None:
    # At the kernel level: at CPL 3 a page-table based KVM lets the host's processor answer, unless that can fault.
    # mov eax, 1; cpuid; mov eax, ebx; shr eax, 24; out 0x12, al
    vcpu = boot(bytes.fromhex("b801000000 0fa2 89d8 c1e818 e612"), index=5, cpl=0)
    assert vcpu.index == 5
    assert vcpu.run() == out(0x12, b"\x05")


# --- kicks, in one thread; test_kick.py has two


def test_a_request_before_the_first_run_is_kept(boot: Boot) -> None:
    vcpu = boot(b"\xeb\xfe")  # jmp $
    vcpu.request_exit()
    assert vcpu.run() == Interrupted()
    assert vcpu.run() == Interrupted(), "kept until it is cleared"


def test_a_request_to_a_prepared_thread_leaves_no_signal_behind(boot: Boot) -> None:
    vcpu = boot(b"\xe6\x10\xe6\x10")
    vcpu.prepare_thread()
    vcpu.request_exit()
    vcpu.request_exit()
    assert KICK_SIGNAL in signal.sigpending()
    assert vcpu.run() == Interrupted()
    assert KICK_SIGNAL not in signal.sigpending()
    vcpu.clear_exit_request()
    assert vcpu.run() == out(0x10, b"\0")
    vcpu.release_thread()


def test_a_signal_alone_interrupts_once(boot: Boot) -> None:
    vcpu = boot(b"\xe6\x10")
    vcpu.prepare_thread()
    signal.pthread_kill(threading.get_ident(), KICK_SIGNAL)
    assert vcpu.run() == Interrupted()
    assert vcpu.run() == out(0x10, b"\0")
    vcpu.release_thread()


def test_a_pending_read_is_completed_before_a_request_is_honoured(boot: Boot) -> None:
    vcpu = boot(IN_THEN_OUT)
    vcpu.prepare_thread()
    vcpu.run()
    vcpu.complete_read(b"z")
    vcpu.request_exit()
    assert vcpu.run() == Interrupted()
    assert vcpu.registers().rax & 0xFF == ord("z")
    vcpu.clear_exit_request()
    assert vcpu.run() == out(0x12, b"z")
    vcpu.release_thread()


def test_releasing_restores_the_signal_mask_and_eats_kicks(boot: Boot) -> None:
    vcpu = boot(b"\xeb\xfe")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert KICK_SIGNAL not in before
    vcpu.prepare_thread()
    vcpu.prepare_thread()
    vcpu.request_exit()
    vcpu.release_thread()  # with the kick pending: unblocking it uneaten would end the process
    vcpu.release_thread()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


def test_no_signal_after_releasing(boot: Boot) -> None:
    vcpu = boot(b"\xeb\xfe")
    signal.pthread_sigmask(signal.SIG_BLOCK, [KICK_SIGNAL])
    try:
        vcpu.prepare_thread()
        vcpu.release_thread()
        vcpu.request_exit()
        assert KICK_SIGNAL not in signal.sigpending()
        assert KICK_SIGNAL in signal.pthread_sigmask(signal.SIG_BLOCK, []), "it was not ours to unblock"
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [KICK_SIGNAL])


def test_a_vcpu_belongs_to_one_thread(boot: Boot) -> None:
    vcpu = boot(b"\xeb\xfe")
    vcpu.prepare_thread()
    with ThreadPoolExecutor(1) as other:
        with pytest.raises(RuntimeError, match="vCPU 0 is already run by another thread"):
            other.submit(vcpu.prepare_thread).result()
        with pytest.raises(RuntimeError, match="which has to release it"):
            other.submit(vcpu.release_thread).result()
    vcpu.release_thread()


def test_a_refused_signal_mask_leaves_the_thread_as_it_was(boot: Boot, monkeypatch: pytest.MonkeyPatch) -> None:
    vcpu = boot(b"\xeb\xfe")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    monkeypatch.setattr(subject, "_SIGSET_BYTES", 16)
    with pytest.raises(BackendError, match="cannot set the signal mask of vCPU 0: Invalid argument"):
        vcpu.prepare_thread()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


# --- failures and the end


def test_page_tables_beyond_the_address_width_are_refused(boot: Boot) -> None:
    vcpu = boot(b"\xf4")
    with pytest.raises(BackendError, match="set the special registers of vCPU 0: Invalid argument"):
        vcpu.set_long_mode(cr3=1 << 60, cpl=3)


def test_a_failing_run_is_no_exit(boot: Boot, monkeypatch: pytest.MonkeyPatch) -> None:
    vcpu = boot(b"\xf4")

    def broken(_fd: int, _request: int, _argument: int) -> int:
        ctypes.set_errno(errno.EIO)
        return -1

    monkeypatch.setattr(subject, "raw_ioctl", broken)
    with pytest.raises(BackendError, match="cannot run vCPU 0: Input/output error") as caught:
        vcpu.run()
    assert caught.value.errno == errno.EIO


def test_eagain_is_an_interruption(boot: Boot, monkeypatch: pytest.MonkeyPatch) -> None:
    vcpu = boot(b"\xf4")

    def again(_fd: int, _request: int, _argument: int) -> int:
        ctypes.set_errno(errno.EAGAIN)
        return -1

    monkeypatch.setattr(subject, "raw_ioctl", again)
    assert vcpu.run() == Interrupted()


def test_closing_twice_leaves_nothing_open(vm: Vm, fds: Callable[[], frozenset[str]]) -> None:
    before = fds()
    vcpu = vm.create_vcpu(0, MERGED)
    vcpu.prepare_thread()
    vcpu.release_thread()
    assert fds() != before
    vcpu.close()
    vcpu.close()
    assert fds() == before
    vcpu.request_exit()  # a late kick is harmless
    for use in (vcpu.run, vcpu.registers, vcpu.prepare_thread, lambda: vcpu.complete_read(b"z")):
        with pytest.raises(ValueError, match="vCPU 0 is used after it was closed"):
            use()


def test_a_page_that_cannot_be_mapped_closes_the_vcpu(
    vm: Vm, fds: Callable[[], frozenset[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_fd: int, _size: int) -> NoReturn:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    before = fds()
    monkeypatch.setattr(subject, "mmap", full)
    with pytest.raises(BackendError, match="cannot map the shared page of vCPU 0"):
        vm.create_vcpu(0, MERGED)
    assert fds() == before
