"""The page that a vCPU shares with the kernel: ``struct kvm_run``, and the exits that kvmd decodes from it.

Source: Documentation/virt/kvm/api.rst, 5. The kvm_run structure. The classes are the ABI's description, held
against the header by the tests; the hot path reads the page with ``struct`` at the offsets below, which costs
half of what a ctypes view does once more than two fields are wanted.
"""

from __future__ import annotations

import ctypes
from ctypes import c_char
from ctypes import c_uint8 as u8
from ctypes import c_uint16 as u16
from ctypes import c_uint32 as u32
from ctypes import c_uint64 as u64


class ExitUnknown(ctypes.Structure):
    """``hw``."""

    _fields_ = (("hardware_exit_reason", u64),)


class ExitFailEntry(ctypes.Structure):
    """``fail_entry``."""

    _fields_ = (("hardware_entry_failure_reason", u64), ("cpu", u32))


class ExitIo(ctypes.Structure):
    """``io``; ``data_offset`` is in bytes from the start of kvm_run."""

    _fields_ = (
        ("direction", u8),
        ("size", u8),
        ("port", u16),
        ("count", u32),
        ("data_offset", u64),
    )


class ExitMmio(ctypes.Structure):
    """``mmio``."""

    _fields_ = (("phys_addr", u64), ("data", u8 * 8), ("len", u32), ("is_write", u8))


class ExitHypercall(ctypes.Structure):
    """``hypercall``; ``longmode`` became ``flags`` of 64 bits in Linux 6.8."""

    _fields_ = (("nr", u64), ("args", u64 * 6), ("ret", u64), ("longmode", u32), ("pad", u32))


class ExitInternal(ctypes.Structure):
    """``internal``: the first ``ndata`` of ``data`` are valid."""

    _fields_ = (("suberror", u32), ("ndata", u32), ("data", u64 * 16))


class ExitEmulationFailure(ctypes.Structure):
    """``emulation_failure``: ``internal`` with suberror KVM_INTERNAL_ERROR_EMULATION."""

    _fields_ = (
        ("suberror", u32),
        ("ndata", u32),
        ("flags", u64),
        ("insn_size", u8),
        ("insn_bytes", u8 * 15),
    )


class ExitSystemEvent(ctypes.Structure):
    """``system_event``."""

    _fields_ = (("type", u32), ("ndata", u32), ("data", u64 * 16))


class ExitMemoryFault(ctypes.Structure):
    """``memory_fault`` (Linux 6.8)."""

    _fields_ = (("flags", u64), ("gpa", u64), ("size", u64))


class ExitMemory(ctypes.Structure):
    """``memory`` of the RFC, version 9, which was never merged."""

    _fields_ = (("flags", u32), ("padding", u32), ("gpa", u64), ("size", u64))


class ExitUnion(ctypes.Union):
    """The union of ``struct kvm_run``: which member is valid is said by ``exit_reason``."""

    _fields_ = (
        ("hw", ExitUnknown),
        ("fail_entry", ExitFailEntry),
        ("io", ExitIo),
        ("mmio", ExitMmio),
        ("hypercall", ExitHypercall),
        ("internal", ExitInternal),
        ("emulation_failure", ExitEmulationFailure),
        ("system_event", ExitSystemEvent),
        ("memory_fault", ExitMemoryFault),
        ("memory", ExitMemory),
        ("padding", c_char * 256),
    )


class KvmRun(ctypes.Structure):
    """``struct kvm_run`` of x86 up to its union; the registers for KVM_CAP_SYNC_REGS follow."""

    _anonymous_ = ("exit",)
    _fields_ = (
        ("request_interrupt_window", u8),
        ("immediate_exit", u8),
        ("padding1", u8 * 6),
        ("exit_reason", u32),
        ("ready_for_interrupt_injection", u8),
        ("if_flag", u8),
        ("flags", u16),
        ("cr8", u64),
        ("apic_base", u64),
        ("exit", ExitUnion),
    )


IMMEDIATE_EXIT_OFFSET: int = KvmRun.immediate_exit.offset
EXIT_REASON_OFFSET: int = KvmRun.exit_reason.offset
UNION_OFFSET: int = KvmRun.hw.offset
MMIO_DATA_OFFSET: int = UNION_OFFSET + ExitMmio.data.offset
HYPERCALL_RET_OFFSET: int = UNION_OFFSET + ExitHypercall.ret.offset

KVM_EXIT_IO_IN = 0
KVM_EXIT_IO_OUT = 1
KVM_INTERNAL_ERROR_EMULATION = 1
KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES = 1 << 0
KVM_MEMORY_EXIT_FLAG_PRIVATE = 1 << 3
"""The private bit of ``memory_fault.flags`` (Linux 6.8)."""
RFC_MEMORY_EXIT_FLAG_PRIVATE = 1 << 0
"""The private bit of ``memory.flags`` in the RFC, version 9."""

KVM_EXIT_UNKNOWN = 0
KVM_EXIT_IO = 2
KVM_EXIT_HYPERCALL = 3
KVM_EXIT_HLT = 5
KVM_EXIT_MMIO = 6
KVM_EXIT_SHUTDOWN = 8
KVM_EXIT_FAIL_ENTRY = 9
KVM_EXIT_INTERNAL_ERROR = 17
KVM_EXIT_SYSTEM_EVENT = 24
RFC_EXIT_MEMORY_FAULT = 38
"""KVM_EXIT_MEMORY_FAULT of the RFC; the number was given to KVM_EXIT_LOONGARCH_IOCSR."""
KVM_EXIT_MEMORY_FAULT = 39  # Linux 6.8
