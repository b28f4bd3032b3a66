"""Why KVM_RUN returned 0: ``struct kvm_run`` decoded into the messages of ``kvmd.hv.exits``.

Pure decoding, without I/O. Source: Documentation/virt/kvm/api.rst, 5. The kvm_run structure.
"""

from __future__ import annotations

import struct

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
from kvmd.kvm.fault_layout import RunPage
from kvmd.kvm.run_page import (
    KVM_EXIT_FAIL_ENTRY,
    KVM_EXIT_HLT,
    KVM_EXIT_HYPERCALL,
    KVM_EXIT_INTERNAL_ERROR,
    KVM_EXIT_IO,
    KVM_EXIT_IO_IN,
    KVM_EXIT_IO_OUT,
    KVM_EXIT_MMIO,
    KVM_EXIT_SHUTDOWN,
    KVM_EXIT_SYSTEM_EVENT,
    KVM_EXIT_UNKNOWN,
    KVM_INTERNAL_ERROR_EMULATION,
    KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES,
    MMIO_DATA_OFFSET,
    UNION_OFFSET,
)

_IO = struct.Struct("=BBHIQ")  # direction, size, port, count, data_offset: ExitIo
_MMIO = struct.Struct("=Q8sIB")  # phys_addr, data, len, is_write: ExitMmio
_HYPERCALL = struct.Struct("=QQQQ")  # nr, args[0..2]: ExitHypercall
_INTERNAL = struct.Struct("=II")  # suberror, ndata: ExitInternal
_EMULATION = struct.Struct("=IIQB15s")  # ..., flags, insn_size, insn_bytes: ExitEmulationFailure
_SYSTEM_EVENT = struct.Struct("=I")  # the event's number: ExitSystemEvent
_FAIL_ENTRY = struct.Struct("=QI")  # hardware_entry_failure_reason, cpu: ExitFailEntry
_U64 = struct.Struct("=Q")

_INTERNAL_DATA_LIMIT = 16
_INSTRUCTION_NDATA = 3
"""``ndata`` of an emulation failure that has flags (one) and instruction bytes (two)."""

_INTERNAL_ERRORS = {
    1: "KVM_INTERNAL_ERROR_EMULATION",
    2: "KVM_INTERNAL_ERROR_SIMUL_EX",
    3: "KVM_INTERNAL_ERROR_DELIVERY_EV",
    4: "KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON",
}

EXIT_NAMES = {
    number: f"KVM_EXIT_{name}"
    for number, name in enumerate(
        (
            *("UNKNOWN", "EXCEPTION", "IO", "HYPERCALL", "DEBUG", "HLT", "MMIO", "IRQ_WINDOW_OPEN"),
            *("SHUTDOWN", "FAIL_ENTRY", "INTR", "SET_TPR", "TPR_ACCESS", "S390_SIEIC", "S390_RESET", "DCR"),
            *("NMI", "INTERNAL_ERROR", "OSI", "PAPR_HCALL", "S390_UCONTROL", "WATCHDOG", "S390_TSCH", "EPR"),
            *("SYSTEM_EVENT", "S390_STSI", "IOAPIC_EOI", "HYPERV", "ARM_NISV", "X86_RDMSR", "X86_WRMSR"),
            *("DIRTY_RING_FULL", "AP_RESET_HOLD", "X86_BUS_LOCK", "XEN", "RISCV_SBI", "RISCV_CSR", "NOTIFY"),
            "LOONGARCH_IOCSR",  # Linux 6.13
            "MEMORY_FAULT",  # Linux 6.8
            "TDX",  # Linux 6.16
            "ARM_SEA",  # Linux 6.19
            *("ARM_LDST64B", "SNP_REQ_CERTS"),  # Linux 7.0
        )
    )
}
"""The names of linux/kvm.h by exit reason; a number alone would send every reader of a log to the header."""


def decode_exit(exit_reason: int, run: RunPage) -> Exit:  # noqa: PLR0911  one for each exit
    """Return why the guest was left, given that KVM_RUN returned 0 and that no memory fault explains it.

    Args:
        exit_reason: ``kvm_run.exit_reason``.
        run: the vCPU's mapping, all of it: the data of a port access follows ``struct kvm_run``.
    """
    if exit_reason == KVM_EXIT_IO:
        direction, size, port, count, data_offset = _IO.unpack_from(run, UNION_OFFSET)
        if direction == KVM_EXIT_IO_OUT:
            data = bytes(run[data_offset : data_offset + size * count])
            return PortIo(port, size, count, is_write=True, data=data)
        return PortIo(port, size, count, is_write=False, data=b"")
    if exit_reason == KVM_EXIT_MMIO:
        gpa, data, length, is_write = _MMIO.unpack_from(run, UNION_OFFSET)
        return Mmio(gpa, length, bool(is_write), data[:length] if is_write else b"")
    if exit_reason == KVM_EXIT_HYPERCALL:
        number, a0, a1, a2 = _HYPERCALL.unpack_from(run, UNION_OFFSET)
        return Hypercall(number, (a0, a1, a2))
    if exit_reason == KVM_EXIT_HLT:
        return Halted()
    if exit_reason == KVM_EXIT_SHUTDOWN:
        return Shutdown()
    if exit_reason == KVM_EXIT_SYSTEM_EVENT:
        (event,) = _SYSTEM_EVENT.unpack_from(run, UNION_OFFSET)
        return SystemEvent(event)
    if exit_reason == KVM_EXIT_INTERNAL_ERROR:
        return _internal_error(run)
    return _unexpected(exit_reason, run)


def pending_read(exit_reason: int, run: RunPage) -> tuple[int, int] | None:
    """Return where the data of the pending load goes, as (offset, length) in bytes of the vCPU's mapping.

    None where the last exit was neither an IN nor a load from memory that nothing backs.
    """
    if exit_reason == KVM_EXIT_IO:
        direction, size, _port, count, data_offset = _IO.unpack_from(run, UNION_OFFSET)
        return (data_offset, size * count) if direction == KVM_EXIT_IO_IN else None
    if exit_reason == KVM_EXIT_MMIO:
        _gpa, _data, length, is_write = _MMIO.unpack_from(run, UNION_OFFSET)
        return None if is_write else (MMIO_DATA_OFFSET, length)
    return None


def _internal_error(run: RunPage) -> Exit:
    suberror, ndata = _INTERNAL.unpack_from(run, UNION_OFFSET)
    if suberror == KVM_INTERNAL_ERROR_EMULATION:
        _suberror, _ndata, flags, size, instruction = _EMULATION.unpack_from(run, UNION_OFFSET)
        # Kernels before 5.14 leave flags unset and say so by ndata: then they hold some earlier exit's bytes.
        if ndata >= _INSTRUCTION_NDATA and flags & KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES:
            return EmulationFailure(instruction[:size])
        return EmulationFailure(b"")
    name = _INTERNAL_ERRORS.get(suberror, f"suberror {suberror}")
    # Bounded: ndata is the kernel's word, but it indexes an array of ours.
    data = struct.unpack_from(f"={min(ndata, _INTERNAL_DATA_LIMIT)}Q", run, UNION_OFFSET + _INTERNAL.size)
    return UnexpectedExit(
        "KVM_EXIT_INTERNAL_ERROR", " ".join((name, *(f"data[{i}]={x:#x}" for i, x in enumerate(data))))
    )


def _unexpected(exit_reason: int, run: RunPage) -> UnexpectedExit:
    name = EXIT_NAMES.get(exit_reason, f"exit reason {exit_reason}")
    if exit_reason == KVM_EXIT_FAIL_ENTRY:
        reason, cpu = _FAIL_ENTRY.unpack_from(run, UNION_OFFSET)
        return UnexpectedExit(name, f"hardware_entry_failure_reason={reason:#x} cpu={cpu}")
    if exit_reason == KVM_EXIT_UNKNOWN:
        (reason,) = _U64.unpack_from(run, UNION_OFFSET)
        return UnexpectedExit(name, f"hardware_exit_reason={reason:#x}")
    return UnexpectedExit(name, "nothing that kvmd enables")
