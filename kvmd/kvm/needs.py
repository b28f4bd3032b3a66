"""What a way of protecting memory needs of KVM: capabilities, by number and bits. Probed, never guessed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvmd.kvm import uapi

MMAP_AND_INIT_SHARED = uapi.GUEST_MEMFD_FLAG_MMAP | uapi.GUEST_MEMFD_FLAG_INIT_SHARED
"""The flags of a guest_memfd that a tripwire is created with."""


@dataclass(frozen=True, slots=True)
class Need:
    """One capability, or some bits of its answer.

    Attributes:
        capability: its name in linux/kvm.h.
        number: its number there.
        bits: all of these must be set in KVM's answer.
        thing: what the bits stand for, where that is more than the capability itself.
    """

    capability: str
    number: int
    bits: int = 1
    thing: str = ""

    def __str__(self) -> str:
        return self.thing or self.capability


SOFTWARE_PROTECTED_VM = Need(
    "KVM_CAP_VM_TYPES", uapi.KVM_CAP_VM_TYPES, 1 << uapi.KVM_X86_SW_PROTECTED_VM, "KVM_X86_SW_PROTECTED_VM"
)
"""The type of VM whose pages have the attribute PRIVATE on any processor (CONFIG_KVM_SW_PROTECTED_VM)."""

ATTRIBUTE_TRIPWIRE = (
    SOFTWARE_PROTECTED_VM,
    Need(
        "KVM_CAP_MEMORY_ATTRIBUTES",
        uapi.KVM_CAP_MEMORY_ATTRIBUTES,
        uapi.KVM_MEMORY_ATTRIBUTE_PRIVATE,
        "KVM_CAP_MEMORY_ATTRIBUTES with PRIVATE",
    ),
    Need("KVM_CAP_MEMORY_FAULT_INFO", uapi.KVM_CAP_MEMORY_FAULT_INFO),
)
"""Of tripwires by attribute."""

GUEST_MEMFD_TRIPWIRE = (
    Need(
        "KVM_CAP_GUEST_MEMFD_FLAGS",
        uapi.KVM_CAP_GUEST_MEMFD_FLAGS,
        MMAP_AND_INIT_SHARED,
        "KVM_CAP_GUEST_MEMFD_FLAGS with MMAP and INIT_SHARED (Linux 6.18)",
    ),
)
"""Of tripwires by a closed guest_memfd."""

GUEST_MEMFD = (
    *ATTRIBUTE_TRIPWIRE,
    Need("KVM_CAP_USER_MEMORY2", uapi.KVM_CAP_USER_MEMORY2),
    Need("KVM_CAP_GUEST_MEMFD", uapi.KVM_CAP_GUEST_MEMFD),
    Need(
        "KVM_CAP_EXIT_HYPERCALL",
        uapi.KVM_CAP_EXIT_HYPERCALL,
        1 << uapi.KVM_HC_MAP_GPA_RANGE,
        "KVM_CAP_EXIT_HYPERCALL with KVM_HC_MAP_GPA_RANGE",
    ),
)
"""Of private memory in a guest_memfd, which guests convert by asking."""


def first_lacking(needs: tuple[Need, ...], ask: Callable[[int], int]) -> Need | None:
    """Return the first need that is not met, or None.

    Args:
        needs: what is needed.
        ask: returns KVM's answer for a capability's number, 0 for missing.
    """
    return next((need for need in needs if ask(need.number) & need.bits != need.bits), None)
