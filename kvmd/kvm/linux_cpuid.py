"""The processor that a Linux guest sees: what KVM supports, made one of a machine of one socket.

Sources: Intel SDM volume 2A, CPUID; AMD64 APM volume 3, appendix E; Documentation/virt/kvm/x86/cpuid.rst.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from kvmd.kvm.cpuid import CpuidEntry

_FEATURES = 0x1
_CACHES = 0x4
_MONITOR = 0x5
_POWER = 0x6
_PERFORMANCE = 0xA
_TOPOLOGIES = (0xB, 0x1F)
_ENCLAVES = 0x12
_TRACE = 0x14
_HYPERVISOR = 0x4000_0000
_KVM_FEATURES = 0x4000_0001
_EXTENDED_FEATURES = 0x8000_0001
_CORES = 0x8000_0008
_NESTED = 0x8000_000A
_AMD_CACHES = 0x8000_001D
_AMD_TOPOLOGY = 0x8000_001E
_ENCRYPTION = 0x8000_001F
_AMD_PERFORMANCE = 0x8000_0022

_LEFT_OUT = frozenset({_MONITOR, _PERFORMANCE, *_TOPOLOGIES, _ENCLAVES, _TRACE, _NESTED, _ENCRYPTION, _AMD_PERFORMANCE})
"""Leaves of what a guest here cannot have: counters, enclaves, trace, guests of its own, encryption.

Topology is made anew."""

# Leaf 1, ECX and EDX.
_MONITOR_BIT = 1 << 3
_VMX = 1 << 5
_PDCM = 1 << 15
_X2APIC = 1 << 21
_TSC_DEADLINE = 1 << 24
_RUNS_IN_HYPERVISOR = 1 << 31
_DEBUG_STORE = 1 << 2 | 1 << 4
_DS = 1 << 21
_HTT = 1 << 28

# Leaf 7, index 0, EBX and ECX.
_SGX = 1 << 2
_PROCESSOR_TRACE = 1 << 25
_SGX_LAUNCH_CONTROL = 1 << 30

# Leaf 0x80000001, ECX.
_CMP_LEGACY = 1 << 1
_SVM = 1 << 2
_PERFORMANCE_CORE = 1 << 23
_PERFORMANCE_NB = 1 << 24
_PERFORMANCE_L2 = 1 << 28
_TOPOLOGY_EXTENSIONS = 1 << 22

# Leaf 0x40000001, EAX.
_KVM_CLOCKSOURCE = 1 << 0
_KVM_NOP_IO_DELAY = 1 << 1
_KVM_CLOCKSOURCE2 = 1 << 3
_KVM_STEAL_TIME = 1 << 5
_KVM_PV_EOI = 1 << 6
_KVM_PV_UNHALT = 1 << 7
_KVM_PV_TLB_FLUSH = 1 << 9
_KVM_ASYNC_PF_VMEXIT = 1 << 10
_KVM_PV_SEND_IPI = 1 << 11
_KVM_POLL_CONTROL = 1 << 12
_KVM_PV_SCHED_YIELD = 1 << 13
_KVM_CLOCKSOURCE_STABLE = 1 << 24
_KVM_WHOLLY_IN_KERNEL = (
    _KVM_CLOCKSOURCE
    | _KVM_NOP_IO_DELAY
    | _KVM_CLOCKSOURCE2
    | _KVM_STEAL_TIME
    | _KVM_PV_EOI
    | _KVM_PV_UNHALT
    | _KVM_PV_TLB_FLUSH
    | _KVM_PV_SEND_IPI
    | _KVM_POLL_CONTROL
    | _KVM_PV_SCHED_YIELD
    | _KVM_CLOCKSOURCE_STABLE
)
"""What needs nothing of the VMM: not the hypercalls for migration and conversion, nor APIC ids beyond the IOAPIC's."""

_SIGNIFICANT_INDEX = 1 << 0
"""KVM_CPUID_FLAG_SIGNIFCANT_INDEX: the entry is for its index alone."""

_BYTE = 0xFF
_THREAD_LEVEL, _CORE_LEVEL = 1, 2
_MASK = (1 << 32) - 1


def linux_cpuid(entries: Iterable[CpuidEntry], *, index: int, vcpus: int, tsc_deadline: bool) -> tuple[CpuidEntry, ...]:
    """Return the CPUID of vCPU ``index`` of ``vcpus``: each a core of its own, all in one socket.

    Args:
        entries: what KVM_GET_SUPPORTED_CPUID returned.
        index: the vCPU, and its APIC id.
        vcpus: of the machine.
        tsc_deadline: KVM's local APIC has the timer's TSC-deadline mode (KVM_CAP_TSC_DEADLINE_TIMER).
    """
    made = [
        _made(entry, index, vcpus, tsc_deadline=tsc_deadline) for entry in entries if entry.function not in _LEFT_OUT
    ]
    return (*made, *_topology(index, vcpus))


def id_bits(vcpus: int) -> int:
    """Return how many bits tell the cores of a socket apart."""
    return (vcpus - 1).bit_length()


def _made(  # noqa: PLR0911 - one for each leaf
    entry: CpuidEntry, index: int, vcpus: int, *, tsc_deadline: bool
) -> CpuidEntry:
    match entry.function:
        case 0x1:
            return _features(entry, index, vcpus, tsc_deadline=tsc_deadline)
        case 0x4 | 0x8000_001D:
            return _cache(entry, vcpus, intel=entry.function == _CACHES)
        case 0x7 if entry.index == 0:
            ebx = entry.ebx & ~(_SGX | _PROCESSOR_TRACE)
            return replace(entry, ebx=ebx, ecx=entry.ecx & ~_SGX_LAUNCH_CONTROL)
        case 0x40000001:
            return replace(entry, eax=entry.eax & _KVM_WHOLLY_IN_KERNEL)
        case 0x8000_0001:
            ecx = entry.ecx & ~(_SVM | _PERFORMANCE_CORE | _PERFORMANCE_NB | _PERFORMANCE_L2 | _CMP_LEGACY)
            # AMD's word for "the cores counted in leaf 1 are cores"; Intel's processors leave it 0.
            return replace(entry, ecx=ecx | (_CMP_LEGACY if vcpus > 1 and entry.ecx & _CMP_LEGACY else 0))
        case 0x8000_0008:
            return replace(entry, ecx=id_bits(vcpus) << 12 | min(vcpus - 1, _BYTE))
        case 0x8000_001E:
            return replace(entry, eax=index, ebx=index & _BYTE, ecx=0)
        case _:
            return entry


def _features(entry: CpuidEntry, index: int, vcpus: int, *, tsc_deadline: bool) -> CpuidEntry:
    ebx = entry.ebx & 0xFFFF | min(1 << id_bits(vcpus), _BYTE) << 16 | (index & _BYTE) << 24
    ecx = entry.ecx & ~(_MONITOR_BIT | _VMX | _PDCM | _DEBUG_STORE | _TSC_DEADLINE) & _MASK
    ecx |= _RUNS_IN_HYPERVISOR | _X2APIC | (_TSC_DEADLINE if tsc_deadline else 0)
    edx = entry.edx & ~(_HTT | _DS) | (_HTT if vcpus > 1 else 0)
    return replace(entry, ebx=ebx, ecx=ecx, edx=edx)


def _cache(entry: CpuidEntry, vcpus: int, *, intel: bool) -> CpuidEntry:
    """Caches up to the second level belong to a core, the others to all."""
    level = entry.eax >> 5 & 0x7
    kind = entry.eax & 0x1F
    if kind == 0:
        return entry
    sharing = 0 if level < 3 else min((1 << id_bits(vcpus)) - 1, 0xFFF)  # noqa: PLR2004 - the third level
    eax = entry.eax & 0x3FFF | sharing << 14
    if intel:
        eax |= min((1 << id_bits(vcpus)) - 1, 0x3F) << 26
    return replace(entry, eax=eax)


def _topology(index: int, vcpus: int) -> Iterable[CpuidEntry]:
    """Return leaf 0xB: one thread a core, all cores in one socket, and an empty level as the end."""
    for level, (kind, bits, count) in enumerate(
        ((_THREAD_LEVEL, 0, 1), (_CORE_LEVEL, id_bits(vcpus), vcpus), (0, 0, 0))
    ):
        yield CpuidEntry(0xB, level, _SIGNIFICANT_INDEX, bits, count, kind << 8 | level, index)
