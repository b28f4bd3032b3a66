"""One vCPU of KVM: entering the guest, and getting out of it."""

from __future__ import annotations

import ctypes
import errno as errno_codes
import os
import signal
import struct
import sys
import threading
from collections.abc import Iterable, Mapping
from mmap import mmap
from typing import NoReturn

from kvmd.errors import BackendError
from kvmd.hv.exits import Exit, Interrupted
from kvmd.hv.vcpu import Registers
from kvmd.kvm.cpuid import CpuidEntry, with_apic_id, write_table
from kvmd.kvm.exits import decode_exit, pending_read
from kvmd.kvm.fault_layout import FaultLayout
from kvmd.kvm.fd import OwnedFd
from kvmd.kvm.ioctl import raw_ioctl
from kvmd.kvm.run_page import (
    EXIT_REASON_OFFSET,
    HYPERCALL_RET_OFFSET,
    IMMEDIATE_EXIT_OFFSET,
    KVM_EXIT_HYPERCALL,
)
from kvmd.kvm.segments import enter_long_mode, enter_protected_mode
from kvmd.kvm.uapi import (
    KVM_GET_LAPIC,
    KVM_GET_REGS,
    KVM_GET_SREGS,
    KVM_RUN,
    KVM_SET_CPUID2,
    KVM_SET_LAPIC,
    KVM_SET_MSRS,
    KVM_SET_REGS,
    KVM_SET_SIGNAL_MASK,
    KVM_SET_SREGS,
    KVM_TRANSLATE,
    LapicState,
    MsrEntry,
    Msrs,
    Regs,
    SignalMask,
    Sregs,
    Translation,
)

KICK_SIGNAL = signal.SIGUSR1
"""Interrupts KVM_RUN. Blocked in a vCPU's thread but for KVM_RUN itself, so no handler ever sees it."""

_KICK_SET = frozenset({KICK_SIGNAL})
_INTERRUPTED = Interrupted()
_U32 = struct.Struct("=I")
_U64 = struct.Struct("=Q")
_REGISTERS = struct.Struct("=18Q")  # Regs, in the order of kvmd.hv.vcpu.Registers
_SIGSET_BYTES = 8
"""The size of the kernel's sigset_t, which KVM insists on; that of the C library is 128."""

# Offsets and delivery modes of the local vector table: Intel SDM volume 3A, 11.5.1.
_APIC_LVT_LINT0 = 0x350
_APIC_LVT_LINT1 = 0x360
_APIC_MODE_SHIFT = 8
_APIC_MODE_NMI = 0b100
_APIC_MODE_EXTINT = 0b111

_HYPERCALL_RESULTS = (0, errno_codes.EINVAL, errno_codes.EAGAIN)


class KvmVcpu:
    """A vCPU (Documentation/virt/kvm/api.rst, 4.7 KVM_CREATE_VCPU); implements ``kvmd.hv.vcpu.Vcpu``.

    Args:
        fd: the vCPU's descriptor, owned from now on.
        index: the vCPU's number.
        mmap_size: bytes that it shares with the kernel.
        layout: how its memory faults are reported.

    Raises:
        BackendError: the shared page cannot be mapped.
    """

    def __init__(self, fd: int, index: int, mmap_size: int, layout: FaultLayout) -> None:
        self._fd = OwnedFd(fd, f"vCPU {index}")
        self._index = index
        self._layout = layout
        # The thread that request_exit may signal, and whether it may still touch the shared page: both
        # change only under this lock, so that no signal goes to a thread that has left, or to a stranger
        # that got its identity.
        self._lock = threading.Lock()
        self._thread: int | None = None
        self._unblock_on_release = False
        self._regs = Regs()
        try:
            self._run = mmap(fd, mmap_size)
        except OSError as error:
            self._fd.close()
            raise BackendError(
                f"cannot map the shared page of vCPU {index}: {error.strerror}", error.errno or 0
            ) from error

    @property
    def index(self) -> int:
        """The vCPU's number, from 0."""
        return self._index

    # --- the thread

    def prepare_thread(self) -> None:
        """Make the calling thread the one that runs this vCPU: from now on ``request_exit`` signals it.

        Blocks KICK_SIGNAL in the thread and has KVM unblock it just inside KVM_RUN (4.18
        KVM_SET_SIGNAL_MASK). A kick then stays pending until the guest is entered, whenever it comes.

        Raises:
            BackendError: KVM refused the signal mask.
            RuntimeError: another thread runs this vCPU.
            ValueError: the vCPU is closed.
        """
        me = threading.get_ident()
        with self._lock:
            if self._thread is not None and self._thread != me:
                raise RuntimeError(f"vCPU {self._index} is already run by another thread")
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _KICK_SET)
        try:
            self._set_signal_mask(before - _KICK_SET)
        except (BackendError, ValueError):
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            raise
        # Not where it was blocked already, by an earlier call or for another vCPU of this thread.
        if KICK_SIGNAL not in before:
            self._unblock_on_release = True
        with self._lock:
            self._thread = me

    def release_thread(self) -> None:
        """Undo ``prepare_thread`` in the same thread, before it ends; harmless where nothing is to undo.

        Raises:
            RuntimeError: another thread runs this vCPU.
        """
        with self._lock:
            if self._thread is None:
                return
            if self._thread != threading.get_ident():
                raise RuntimeError(f"vCPU {self._index} is run by another thread, which has to release it")
            self._thread = None
        # Nobody signals any more. Eaten before it is unblocked: its default action ends the process.
        _eat_kicks()
        if self._unblock_on_release:
            self._unblock_on_release = False
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _KICK_SET)

    # --- running

    def run(self) -> Exit:
        """Enter the guest until it leaves, and say why (4.10 KVM_RUN). Releases the GIL meanwhile.

        A pending read or hypercall is completed first, even when an exit was requested.

        Raises:
            BackendError: KVM_RUN failed in a way that is no exit of the guest.
            ValueError: the vCPU is closed.
        """
        fd = self._fd.fileno()
        run = self._run
        # A failing KVM_RUN does not always write it: what is read back has to be of this call.
        _U32.pack_into(run, EXIT_REASON_OFFSET, 0)
        result = raw_ioctl(fd, KVM_RUN, 0)
        errno = 0
        if result:
            errno = ctypes.get_errno()
            if errno == errno_codes.EINTR:
                # Still pending, since it was blocked again before KVM_RUN returned; left alone, it would
                # interrupt every KVM_RUN from now on.
                if self._thread is not None:
                    _eat_kicks()
                return _INTERRUPTED
            if errno == errno_codes.EAGAIN:
                return _INTERRUPTED
        (exit_reason,) = _U32.unpack_from(run, EXIT_REASON_OFFSET)
        fault = self._layout.decode(result, errno, exit_reason, run)
        if fault is not None:
            return fault
        if result:
            cause = OSError(errno, os.strerror(errno))
            raise BackendError(f"cannot run vCPU {self._index}: {cause.strerror}", errno) from cause
        return decode_exit(exit_reason, run)

    def request_exit(self) -> None:
        """Make the current or the next ``run`` return ``Interrupted``. From any thread.

        Two requests before a ``clear_exit_request`` may be one interruption, or two.
        """
        with self._lock:
            if self._fd.closed:
                return
            # First: a signal that comes between run()'s last look and KVM_RUN finds the flag set. The signal
            # is for a guest that has been entered already, when the flag is not looked at.
            self._run[IMMEDIATE_EXIT_OFFSET] = 1
            if self._thread is not None:
                signal.pthread_kill(self._thread, KICK_SIGNAL)

    def clear_exit_request(self) -> None:
        """Forget exit requests up to now: called after ``run``, before looking at commands."""
        self._run[IMMEDIATE_EXIT_OFFSET] = 0

    def complete_read(self, data: bytes) -> None:
        """Give the data that the pending ``PortIo`` or ``Mmio`` load reads, at the next ``run``.

        Raises:
            ValueError: no load is pending, or ``data`` has not its length.
        """
        target = pending_read(self._exit_reason(), self._run)
        if target is None:
            raise ValueError(f"vCPU {self._index} has no pending read to complete")
        offset, length = target
        if len(data) != length:
            raise ValueError(f"the pending read of vCPU {self._index} takes {length} bytes, not {len(data)}")
        self._run[offset : offset + length] = data

    def complete_hypercall(self, result: int) -> None:
        """Give the result of the pending ``Hypercall``: 0, 22 (EINVAL) or 11 (EAGAIN).

        Raises:
            ValueError: no hypercall is pending, or KVM would fail the vCPU over such a result.
        """
        if result not in _HYPERCALL_RESULTS:
            raise ValueError(f"a hypercall returns one of {_HYPERCALL_RESULTS}, not {result}")
        if self._exit_reason() != KVM_EXIT_HYPERCALL:
            raise ValueError(f"vCPU {self._index} has no pending hypercall to complete")
        _U64.pack_into(self._run, HYPERCALL_RET_OFFSET, result)

    # --- registers

    def set_cpuid(self, entries: Iterable[CpuidEntry]) -> None:
        """Give the guest its processor (4.20 KVM_SET_CPUID2); before ``set_long_mode``, which needs NX in it.

        Args:
            entries: what ``Kvm.supported_cpuid`` returned; the APIC ids are set to this vCPU's number.

        Raises:
            BackendError: KVM refused them.
        """
        table = write_table(with_apic_id(entries, self._index))
        self._ioctl(KVM_SET_CPUID2, ctypes.addressof(table), "set the CPUID")

    def set_long_mode(self, *, cr3: int, cpl: int, gdt: tuple[int, int] | None = None) -> None:
        """Put the vCPU into 64-bit mode; see ``kvmd.hv.vcpu.Vcpu.set_long_mode``.

        Args:
            cr3: as there.
            cpl: as there.
            gdt: address and size in bytes of a descriptor table in guest memory; none by default.

        Raises:
            BackendError: KVM refused, such as EINVAL where ``set_cpuid`` did not come first.
            ValueError: ``cpl`` is neither 0 nor 3.
        """
        sregs = self._special_registers()
        enter_long_mode(sregs, cr3=cr3, cpl=cpl, gdt=gdt)
        self._ioctl(KVM_SET_SREGS, ctypes.addressof(sregs), "set the special registers")

    def set_protected_mode(self, *, gdt: tuple[int, int]) -> None:
        """Put the vCPU into flat 32-bit protected mode without paging, where a PVH kernel starts.

        Args:
            gdt: address and size in bytes of the descriptor table in guest memory.

        Raises:
            BackendError: KVM refused.
        """
        sregs = self._special_registers()
        enter_protected_mode(sregs, gdt=gdt)
        self._ioctl(KVM_SET_SREGS, ctypes.addressof(sregs), "set the special registers")

    def set_msrs(self, values: Mapping[int, int]) -> None:
        """Write model-specific registers, value by number (4.19 KVM_SET_MSRS).

        Raises:
            BackendError: KVM refused one; it says which.
        """
        buffer = ctypes.create_string_buffer(ctypes.sizeof(Msrs) + len(values) * ctypes.sizeof(MsrEntry))
        Msrs.from_buffer(buffer).nmsrs = len(values)
        entries = (MsrEntry * len(values)).from_buffer(buffer, ctypes.sizeof(Msrs))
        for entry, (index, value) in zip(entries, values.items(), strict=True):
            entry.index, entry.data = index, value
        # It returns how many it wrote, and stops at the first that it does not know.
        written = raw_ioctl(self._fd.fileno(), KVM_SET_MSRS, ctypes.addressof(buffer))
        if written < 0:
            _fail("set the model-specific registers", self._index)
        if written < len(values):
            refused = list(values)[written]
            raise BackendError(f"cannot set model-specific register {refused:#x} of vCPU {self._index}")

    def connect_local_interrupts(self) -> None:
        """Set up the local APIC's own pins as a PC's firmware does: LINT0 takes the PICs, LINT1 the NMI.

        Raises:
            BackendError: KVM refused, such as EINVAL for a VM without an interrupt controller in the kernel.
        """
        state = LapicState()
        address = ctypes.addressof(state)
        self._ioctl(KVM_GET_LAPIC, address, "get the local APIC")
        _U32.pack_into(state, _APIC_LVT_LINT0, _APIC_MODE_EXTINT << _APIC_MODE_SHIFT)
        _U32.pack_into(state, _APIC_LVT_LINT1, _APIC_MODE_NMI << _APIC_MODE_SHIFT)
        self._ioctl(KVM_SET_LAPIC, address, "set the local APIC")

    def registers(self) -> Registers:
        """Read the registers (4.11 KVM_GET_REGS).

        Raises:
            BackendError: KVM refused.
        """
        self._ioctl(KVM_GET_REGS, ctypes.addressof(self._regs), "get the registers")
        return Registers(*_REGISTERS.unpack_from(self._regs))

    def set_registers(self, registers: Registers) -> None:
        """Write the registers (4.12 KVM_SET_REGS).

        Raises:
            BackendError: KVM refused.
        """
        r = registers
        _REGISTERS.pack_into(
            self._regs,
            0,
            *(r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rsp, r.rbp),
            *(r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15),
            *(r.rip, r.rflags),
        )
        self._ioctl(KVM_SET_REGS, ctypes.addressof(self._regs), "set the registers")

    def translate(self, address: int) -> int | None:
        """Walk the guest's page tables (4.15 KVM_TRANSLATE).

        Returns the gpa behind the virtual address, C-bit included, or None where nothing is mapped.

        Raises:
            BackendError: KVM refused.
        """
        translation = Translation(linear_address=address)
        self._ioctl(KVM_TRANSLATE, ctypes.addressof(translation), "translate an address")
        return int(translation.physical_address) if translation.valid else None

    # --- the end

    def close(self) -> None:
        """Give up the vCPU once no thread runs it; harmless the second time."""
        with self._lock:
            self._thread = None
            self._run.close()
            self._fd.close()

    def _set_signal_mask(self, blocked: Iterable[int]) -> None:
        bits = sum(1 << (number - 1) for number in blocked)
        mask = bytes(SignalMask(_SIGSET_BYTES)) + bits.to_bytes(_SIGSET_BYTES, sys.byteorder)
        buffer = ctypes.create_string_buffer(mask, len(mask))
        self._ioctl(KVM_SET_SIGNAL_MASK, ctypes.addressof(buffer), "set the signal mask")

    def _special_registers(self) -> Sregs:
        sregs = Sregs()
        self._ioctl(KVM_GET_SREGS, ctypes.addressof(sregs), "get the special registers")
        return sregs

    def _exit_reason(self) -> int:
        self._fd.fileno()  # for its error: struct's own, of a closed mapping, would puzzle
        reason: int = _U32.unpack_from(self._run, EXIT_REASON_OFFSET)[0]
        return reason

    def _ioctl(self, request: int, address: int, operation: str) -> None:
        if raw_ioctl(self._fd.fileno(), request, address):
            _fail(operation, self._index)


def _eat_kicks() -> None:
    """Take every pending kick of the calling thread, without waiting."""
    while signal.sigtimedwait(_KICK_SET, 0) is not None:
        pass


def _fail(operation: str, index: int) -> NoReturn:
    errno = ctypes.get_errno()
    cause = OSError(errno, os.strerror(errno))
    raise BackendError(f"cannot {operation} of vCPU {index}: {cause.strerror}", errno) from cause
