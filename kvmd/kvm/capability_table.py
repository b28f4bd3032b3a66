"""The capabilities of KVM that kvmd cares about: what each is for, and what it costs to lack it."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from kvmd.kvm import uapi


class Scope(enum.Enum):
    """Which descriptor answers for a capability."""

    SYSTEM = "system"
    VM = "vm"


@dataclass(frozen=True, slots=True)
class Capability:
    """A capability in kvmd's eyes.

    Attributes:
        name: as in linux/kvm.h.
        number: as in linux/kvm.h.
        scope: whom to ask; a VM's answer depends on its type.
        purpose: why kvmd wants it.
        without: what kvmd does, or cannot do, where it is missing.
        required: no guest runs without it.
    """

    name: str
    number: int
    scope: Scope
    purpose: str
    without: str
    required: bool = False


VM_TYPE_NAMES = {
    uapi.KVM_X86_DEFAULT_VM: "KVM_X86_DEFAULT_VM",
    uapi.KVM_X86_SW_PROTECTED_VM: "KVM_X86_SW_PROTECTED_VM",
    uapi.KVM_X86_SEV_VM: "KVM_X86_SEV_VM",
    uapi.KVM_X86_SEV_ES_VM: "KVM_X86_SEV_ES_VM",
    uapi.KVM_X86_SNP_VM: "KVM_X86_SNP_VM",
    uapi.KVM_X86_TDX_VM: "KVM_X86_TDX_VM",
}

CAPABILITIES: tuple[Capability, ...] = (
    Capability(
        "KVM_CAP_USER_MEMORY",
        uapi.KVM_CAP_USER_MEMORY,
        Scope.SYSTEM,
        "guest memory out of this process",
        "no guest can run",
        required=True,
    ),
    Capability(
        "KVM_CAP_EXT_CPUID",
        uapi.KVM_CAP_EXT_CPUID,
        Scope.SYSTEM,
        "the guest's processor: 64-bit mode with no-execute pages",
        "no guest can run",
        required=True,
    ),
    Capability(
        "KVM_CAP_IMMEDIATE_EXIT",
        uapi.KVM_CAP_IMMEDIATE_EXIT,
        Scope.SYSTEM,
        "a request to leave the guest is never lost",
        "no guest can be paused or stopped reliably",
        required=True,
    ),
    Capability(
        "KVM_CAP_CHECK_EXTENSION_VM",
        uapi.KVM_CAP_CHECK_EXTENSION_VM,
        Scope.SYSTEM,
        "asking a VM what its type can do",
        "capabilities of a type of VM stay unknown",
        required=True,
    ),
    Capability(
        "KVM_CAP_VM_TYPES",
        uapi.KVM_CAP_VM_TYPES,
        Scope.SYSTEM,
        "finding the types of VM with private memory",
        "only plain VMs; conversions are tripped by memslots",
    ),
    Capability(
        "KVM_CAP_NR_VCPUS",
        uapi.KVM_CAP_NR_VCPUS,
        Scope.SYSTEM,
        "the recommended number of vCPUs of a machine",
        "four are taken to be reasonable",
    ),
    Capability(
        "KVM_CAP_MAX_VCPUS",
        uapi.KVM_CAP_MAX_VCPUS,
        Scope.VM,
        "the largest number of vCPUs of a machine",
        "the recommended number is taken for it",
    ),
    Capability(
        "KVM_CAP_NR_MEMSLOTS",
        uapi.KVM_CAP_NR_MEMSLOTS,
        Scope.VM,
        "bounding how finely memory can be converted by memslots",
        "32 memslots: conversions only in large pieces",
    ),
    Capability(
        "KVM_CAP_USER_MEMORY2",
        uapi.KVM_CAP_USER_MEMORY2,
        Scope.VM,
        "memslots with a guest_memfd",
        "no private memory and no tripwires but holes",
    ),
    Capability(
        "KVM_CAP_GUEST_MEMFD",
        uapi.KVM_CAP_GUEST_MEMFD,
        Scope.VM,
        "memory that only the guest can see",
        "no private memory and no tripwires but holes",
    ),
    Capability(
        "KVM_CAP_GUEST_MEMFD_FLAGS",
        uapi.KVM_CAP_GUEST_MEMFD_FLAGS,
        Scope.VM,
        "tripwires of a closed guest_memfd in plain VMs (MMAP and INIT_SHARED, together 3)",
        "plain VMs see implicit conversions as emulated accesses to holes",
    ),
    Capability(
        "KVM_CAP_MEMORY_FAULT_INFO",
        uapi.KVM_CAP_MEMORY_FAULT_INFO,
        Scope.SYSTEM,
        "memory faults that tell address, size and kind",
        "a fault without information stops the guest",
    ),
    Capability(
        "KVM_CAP_MEMORY_ATTRIBUTES",
        uapi.KVM_CAP_MEMORY_ATTRIBUTES,
        Scope.VM,
        "converting by one attribute, atomically (PRIVATE, 8)",
        "a conversion swaps memslots with the vCPUs out of the guest",
    ),
    Capability(
        "KVM_CAP_EXIT_HYPERCALL",
        uapi.KVM_CAP_EXIT_HYPERCALL,
        Scope.VM,
        "explicit conversions by KVM_HC_MAP_GPA_RANGE (bit 12)",
        "a guest converts by touching memory only, or by a port",
    ),
    Capability(
        "KVM_CAP_EXIT_ON_EMULATION_FAILURE",
        uapi.KVM_CAP_EXIT_ON_EMULATION_FAILURE,
        Scope.VM,
        "a diagnosis, with the instruction, where KVM cannot emulate user code",
        "such a guest gets an invalid-opcode exception instead",
    ),
    Capability(
        "KVM_CAP_DISABLE_QUIRKS2",
        uapi.KVM_CAP_DISABLE_QUIRKS2,
        Scope.VM,
        "deleting a memslot without dropping every page table (SLOT_ZAP_ALL, 128)",
        "each conversion by memslots makes the guest fault all its memory in again",
    ),
)
"""In the order of need: what every guest takes first."""

_NAMES = {capability.number: capability.name for capability in CAPABILITIES}


def capability_name(number: int) -> str:
    """Return the name of a capability in linux/kvm.h, or its number where kvmd has no use for it."""
    return _NAMES.get(number, f"capability {number}")
