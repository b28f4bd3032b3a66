"""The kernel's ABI: structures of linux/kvm.h and asm/kvm.h, and KVM's ioctl numbers.

Only what kvmd uses. Fields bear the header's names; sizes are bytes. What linux/kvm.h of Linux 6.1 lacks is
here by value, with the release that brought it.
"""

from __future__ import annotations

import ctypes
from ctypes import c_uint8 as u8
from ctypes import c_uint16 as u16
from ctypes import c_uint32 as u32
from ctypes import c_uint64 as u64

from kvmd.kvm.ioctl import io, ior, iow, iowr


class UserspaceMemoryRegion(ctypes.Structure):
    """``struct kvm_userspace_memory_region``: the first fields of its successor."""

    _fields_ = (
        ("slot", u32),
        ("flags", u32),
        ("guest_phys_addr", u64),
        ("memory_size", u64),
        ("userspace_addr", u64),
    )


class UserspaceMemoryRegion2(ctypes.Structure):
    """``struct kvm_userspace_memory_region2`` (Linux 6.8)."""

    _fields_ = (
        *UserspaceMemoryRegion._fields_,
        ("guest_memfd_offset", u64),
        ("guest_memfd", u32),
        ("pad1", u32),
        ("pad2", u64 * 14),
    )


class CreateGuestMemfd(ctypes.Structure):
    """``struct kvm_create_guest_memfd`` (Linux 6.8)."""

    _fields_ = (("size", u64), ("flags", u64), ("reserved", u64 * 6))


class MemoryAttributes(ctypes.Structure):
    """``struct kvm_memory_attributes`` (Linux 6.8)."""

    _fields_ = (("address", u64), ("size", u64), ("attributes", u64), ("flags", u64))


class EnableCap(ctypes.Structure):
    """``struct kvm_enable_cap``."""

    _fields_ = (("cap", u32), ("flags", u32), ("args", u64 * 4), ("pad", u8 * 64))


class Regs(ctypes.Structure):
    """``struct kvm_regs`` of x86."""

    _fields_ = (
        *((name, u64) for name in ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp")),
        *((name, u64) for name in ("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15")),
        *((name, u64) for name in ("rip", "rflags")),
    )


class Segment(ctypes.Structure):
    """``struct kvm_segment``."""

    _fields_ = (
        ("base", u64),
        ("limit", u32),
        ("selector", u16),
        *((name, u8) for name in ("type", "present", "dpl", "db", "s", "l", "g", "avl", "unusable", "padding")),
    )


class Dtable(ctypes.Structure):
    """``struct kvm_dtable``."""

    _fields_ = (("base", u64), ("limit", u16), ("padding", u16 * 3))


class Sregs(ctypes.Structure):
    """``struct kvm_sregs`` of x86."""

    _fields_ = (
        *((name, Segment) for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")),
        ("gdt", Dtable),
        ("idt", Dtable),
        *((name, u64) for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")),
        ("interrupt_bitmap", u64 * 4),
    )


class Translation(ctypes.Structure):
    """``struct kvm_translation``."""

    _fields_ = (
        ("linear_address", u64),
        ("physical_address", u64),
        ("valid", u8),
        ("writeable", u8),
        ("usermode", u8),
        ("pad", u8 * 5),
    )


class CpuidEntry2(ctypes.Structure):
    """``struct kvm_cpuid_entry2``."""

    _fields_ = (
        *((name, u32) for name in ("function", "index", "flags", "eax", "ebx", "ecx", "edx")),
        ("padding", u32 * 3),
    )


class Cpuid2(ctypes.Structure):
    """``struct kvm_cpuid2`` without its flexible array, which follows it."""

    _fields_ = (("nent", u32), ("padding", u32))


class SignalMask(ctypes.Structure):
    """``struct kvm_signal_mask`` without its flexible array, which follows it."""

    _fields_ = (("len", u32),)


class PitConfig(ctypes.Structure):
    """``struct kvm_pit_config``."""

    _fields_ = (("flags", u32), ("pad", u32 * 15))


class IrqFd(ctypes.Structure):
    """``struct kvm_irqfd``."""

    _fields_ = (("fd", u32), ("gsi", u32), ("flags", u32), ("resamplefd", u32), ("pad", u8 * 16))


class IoEventFd(ctypes.Structure):
    """``struct kvm_ioeventfd``."""

    _fields_ = (
        ("datamatch", u64),
        ("addr", u64),
        ("len", u32),
        ("fd", ctypes.c_int32),
        ("flags", u32),
        ("pad", u8 * 36),
    )


class MsrEntry(ctypes.Structure):
    """``struct kvm_msr_entry``."""

    _fields_ = (("index", u32), ("reserved", u32), ("data", u64))


class Msrs(ctypes.Structure):
    """``struct kvm_msrs`` without its flexible array, which follows it."""

    _fields_ = (("nmsrs", u32), ("pad", u32))


class LapicState(ctypes.Structure):
    """``struct kvm_lapic_state``: the registers of a local APIC, as they lie in its page."""

    _fields_ = (("regs", u8 * 0x400),)


class Address(ctypes.Structure):
    """A ``__u64``, as KVM_SET_IDENTITY_MAP_ADDR takes it."""

    _fields_ = (("value", u64),)


# --- ioctls of /dev/kvm

KVM_GET_API_VERSION = io(0x00)
KVM_CREATE_VM = io(0x01)
KVM_CHECK_EXTENSION = io(0x03)
KVM_GET_VCPU_MMAP_SIZE = io(0x04)
KVM_GET_SUPPORTED_CPUID = iowr(0x05, Cpuid2)

# --- ioctls of a VM

KVM_CREATE_VCPU = io(0x41)
KVM_SET_USER_MEMORY_REGION = iow(0x46, UserspaceMemoryRegion)
KVM_SET_TSS_ADDR = io(0x47)
KVM_SET_IDENTITY_MAP_ADDR = iow(0x48, Address)
KVM_SET_USER_MEMORY_REGION2 = iow(0x49, UserspaceMemoryRegion2)  # Linux 6.8
KVM_CREATE_IRQCHIP = io(0x60)
KVM_IRQFD = iow(0x76, IrqFd)
KVM_CREATE_PIT2 = iow(0x77, PitConfig)
KVM_IOEVENTFD = iow(0x79, IoEventFd)
KVM_ENABLE_CAP = iow(0xA3, EnableCap)
KVM_SET_MEMORY_ATTRIBUTES = iow(0xD2, MemoryAttributes)  # Linux 6.8
KVM_CREATE_GUEST_MEMFD = iowr(0xD4, CreateGuestMemfd)  # Linux 6.8

# --- ioctls of a vCPU

KVM_RUN = io(0x80)
KVM_GET_REGS = ior(0x81, Regs)
KVM_SET_REGS = iow(0x82, Regs)
KVM_GET_SREGS = ior(0x83, Sregs)
KVM_SET_SREGS = iow(0x84, Sregs)
KVM_TRANSLATE = iowr(0x85, Translation)
KVM_SET_MSRS = iow(0x89, Msrs)
KVM_SET_SIGNAL_MASK = iow(0x8B, SignalMask)
KVM_GET_LAPIC = ior(0x8E, LapicState)
KVM_SET_LAPIC = iow(0x8F, LapicState)
KVM_SET_CPUID2 = iow(0x90, Cpuid2)

KVM_API_VERSION = 12

# --- capabilities

KVM_CAP_IRQCHIP = 0
KVM_CAP_USER_MEMORY = 3
KVM_CAP_SET_TSS_ADDR = 4
KVM_CAP_EXT_CPUID = 7
KVM_CAP_NR_VCPUS = 9
KVM_CAP_NR_MEMSLOTS = 10
KVM_CAP_IRQFD = 32
KVM_CAP_PIT2 = 33
KVM_CAP_IOEVENTFD = 36
KVM_CAP_SET_IDENTITY_MAP_ADDR = 37
KVM_CAP_MAX_VCPUS = 66
KVM_CAP_TSC_DEADLINE_TIMER = 72
KVM_CAP_CHECK_EXTENSION_VM = 105
KVM_CAP_IMMEDIATE_EXIT = 136
KVM_CAP_EXIT_HYPERCALL = 201
KVM_CAP_EXIT_ON_EMULATION_FAILURE = 204
KVM_CAP_DISABLE_QUIRKS2 = 213
KVM_CAP_USER_MEMORY2 = 231  # Linux 6.8
KVM_CAP_MEMORY_FAULT_INFO = 232  # Linux 6.8
KVM_CAP_MEMORY_ATTRIBUTES = 233  # Linux 6.8
KVM_CAP_GUEST_MEMFD = 234  # Linux 6.8
KVM_CAP_VM_TYPES = 235  # Linux 6.8
KVM_CAP_GUEST_MEMFD_FLAGS = 244  # Linux 6.18

# --- arguments

KVM_MEM_GUEST_MEMFD = 1 << 2  # Linux 6.8; a flag of a memory region
KVM_MEMORY_ATTRIBUTE_PRIVATE = 1 << 3  # Linux 6.8
GUEST_MEMFD_FLAG_MMAP = 1 << 0  # Linux 6.18
GUEST_MEMFD_FLAG_INIT_SHARED = 1 << 1  # Linux 6.18
KVM_PIT_SPEAKER_DUMMY = 1 << 0
KVM_IOEVENTFD_FLAG_DATAMATCH = 1 << 0
KVM_X86_QUIRK_SLOT_ZAP_ALL = 1 << 7  # Linux 6.12; deleting a slot drops the page tables of the whole VM
KVM_HC_MAP_GPA_RANGE = 12  # linux/kvm_para.h; also its bit in KVM_CAP_EXIT_HYPERCALL

KVM_X86_DEFAULT_VM = 0
KVM_X86_SW_PROTECTED_VM = 1  # Linux 6.8
KVM_X86_SEV_VM = 2  # Linux 6.10
KVM_X86_SEV_ES_VM = 3  # Linux 6.10
KVM_X86_SNP_VM = 4  # Linux 6.11
KVM_X86_TDX_VM = 5  # Linux 6.16
