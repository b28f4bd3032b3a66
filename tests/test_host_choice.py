"""Which protection a host gives: a KVM that is nothing but its answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import pytest

from kvmd import host_choice
from kvmd.errors import MissingCapability
from kvmd.host_choice import Choice, create_vm
from kvmd.kvm import uapi
from kvmd.kvm.system import Kvm
from kvmd.protection.two_views import Tripwire

PROTECTED = uapi.KVM_X86_SW_PROTECTED_VM
ALL = {
    uapi.KVM_CAP_VM_TYPES: 3,
    uapi.KVM_CAP_MEMORY_ATTRIBUTES: 8,
    uapi.KVM_CAP_MEMORY_FAULT_INFO: 1,
    uapi.KVM_CAP_USER_MEMORY2: 1,
    uapi.KVM_CAP_GUEST_MEMFD: 1,
    uapi.KVM_CAP_EXIT_HYPERCALL: 1 << 12,
    uapi.KVM_CAP_GUEST_MEMFD_FLAGS: 3,
}


@dataclass
class AnsweringVm:
    vm_type: int
    answers: dict[int, int]
    closed: bool = False

    def check_extension(self, cap: int) -> int:
        return self.answers.get(cap, 0)

    def close(self) -> None:
        self.closed = True


@dataclass
class AnsweringKvm:
    answers: dict[int, int]
    refused: bool = False
    vms: list[AnsweringVm] = field(default_factory=list)

    def check_extension(self, cap: int) -> int:
        return self.answers.get(cap, 0)

    def create_vm(self, vm_type: int = uapi.KVM_X86_DEFAULT_VM) -> AnsweringVm:
        if self.refused and vm_type == PROTECTED:
            raise MissingCapability("KVM_CAP_VM_TYPES", "no such VM")
        vm = AnsweringVm(vm_type, self.answers)
        self.vms.append(vm)
        return vm


def choose(protection: str, tripwire: str = "auto", **lacks: int) -> tuple[int, Choice]:
    """Return the type of VM and the choice on a host that can do all but ``lacks``; no other VM is left open.

    ``refused=1``: the host offers VMs with private memory, and then refuses to make one.
    """
    refused = bool(lacks.pop("refused", 0))
    answers = ALL | {getattr(uapi, name): value for name, value in lacks.items()}
    kvm = AnsweringKvm(answers, refused)
    try:
        vm, choice = create_vm(cast("Kvm", kvm), protection, tripwire)
    except MissingCapability:
        assert all(vm.closed for vm in kvm.vms)
        raise
    chosen = cast("AnsweringVm", vm)
    assert [vm for vm in kvm.vms if not vm.closed] == [chosen]
    return chosen.vm_type, choice


@pytest.fixture(autouse=True)
def vms_that_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_choice, "Vm", AnsweringVm)


def test_none_is_a_plain_vm() -> None:
    assert choose("none", "attribute") == (uapi.KVM_X86_DEFAULT_VM, Choice("none"))


def test_attributes_are_preferred_then_guest_memfd_then_holes() -> None:
    assert choose("emulated") == (PROTECTED, Choice("emulated", Tripwire.ATTRIBUTE))
    assert choose("emulated", KVM_CAP_VM_TYPES=1) == (0, Choice("emulated", Tripwire.GUEST_MEMFD))
    assert choose("emulated", KVM_CAP_MEMORY_ATTRIBUTES=0) == (0, Choice("emulated", Tripwire.GUEST_MEMFD))
    assert choose("emulated", refused=1) == (0, Choice("emulated", Tripwire.GUEST_MEMFD))
    bare = choose("emulated", KVM_CAP_VM_TYPES=0, KVM_CAP_GUEST_MEMFD_FLAGS=1)
    assert bare == (0, Choice("emulated", Tripwire.HOLE))


@pytest.mark.parametrize("tripwire", Tripwire)
def test_each_tripwire_can_be_forced(tripwire: Tripwire) -> None:
    vm_type, choice = choose("emulated", tripwire.value)
    assert choice == Choice("emulated", tripwire)
    assert (vm_type == PROTECTED) == (tripwire is Tripwire.ATTRIBUTE)


@pytest.mark.parametrize(
    ("tripwire", "lacks", "capability"),
    [
        ("attribute", "KVM_CAP_VM_TYPES", "KVM_CAP_VM_TYPES"),
        ("attribute", "KVM_CAP_MEMORY_ATTRIBUTES", "KVM_CAP_MEMORY_ATTRIBUTES"),
        ("guest_memfd", "KVM_CAP_GUEST_MEMFD_FLAGS", "KVM_CAP_GUEST_MEMFD_FLAGS"),
    ],
)
def test_a_tripwire_that_the_host_lacks_is_refused(tripwire: str, lacks: str, capability: str) -> None:
    with pytest.raises(MissingCapability, match=f"tripwire {tripwire} needs .*use another one, or auto") as raised:
        choose("emulated", tripwire, **{lacks: 0})
    assert raised.value.capability == capability


def test_guest_memfd_on_a_host_that_has_it() -> None:
    assert choose("guest-memfd") == (PROTECTED, Choice("guest-memfd"))


@pytest.mark.parametrize(
    ("lacks", "named"),
    [
        ({"KVM_CAP_VM_TYPES": 1}, "KVM_X86_SW_PROTECTED_VM"),
        ({"refused": 1}, "KVM_X86_SW_PROTECTED_VM"),
        ({"KVM_CAP_MEMORY_ATTRIBUTES": 1}, "KVM_CAP_MEMORY_ATTRIBUTES with PRIVATE"),
        ({"KVM_CAP_GUEST_MEMFD": 0}, "KVM_CAP_GUEST_MEMFD"),
        ({"KVM_CAP_EXIT_HYPERCALL": 1}, "KVM_CAP_EXIT_HYPERCALL with KVM_HC_MAP_GPA_RANGE"),
    ],
)
def test_guest_memfd_that_the_host_lacks_is_refused_by_name_and_auto_says_so(lacks: dict[str, int], named: str) -> None:
    with pytest.raises(MissingCapability, match=f"protection guest-memfd needs {named}, which") as raised:
        choose("guest-memfd", "auto", **lacks)
    assert raised.value.capability.startswith("KVM_CAP_")
    _, choice = choose("auto", "auto", **lacks)
    assert choice.protection == "emulated"
    assert choice.why == f"auto: guest-memfd would be stronger, but this host's KVM lacks {named}"


def test_auto_takes_the_strongest_and_says_why() -> None:
    vm_type, choice = choose("auto", "hole")
    assert (vm_type, choice.protection, choice.tripwire) == (PROTECTED, "guest-memfd", None)
    assert choice.why.startswith("auto: the strongest")
