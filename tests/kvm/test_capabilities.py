from __future__ import annotations

from collections.abc import Callable

import pytest

from kvmd.errors import HostError, MissingCapability
from kvmd.kvm import uapi
from kvmd.kvm.capabilities import offered_vm_types, probe
from kvmd.kvm.capability_table import CAPABILITIES, Scope, capability_name
from kvmd.kvm.system import Kvm
from kvmd.kvm.vm import Vm


def test_the_table_agrees_with_the_abi() -> None:
    for capability in CAPABILITIES:
        assert getattr(uapi, capability.name) == capability.number
        assert capability.purpose
        assert capability.without
    assert len({capability.number for capability in CAPABILITIES}) == len(CAPABILITIES)


def test_attributes_are_asked_of_the_vm() -> None:
    scopes = {capability.name: capability.scope for capability in CAPABILITIES}
    assert scopes["KVM_CAP_MEMORY_ATTRIBUTES"] is Scope.VM


def test_names() -> None:
    assert capability_name(uapi.KVM_CAP_GUEST_MEMFD) == "KVM_CAP_GUEST_MEMFD"
    assert capability_name(9999) == "capability 9999"


@pytest.mark.parametrize(
    ("bitmap", "types"), [(0, (0,)), (0b1, (0,)), (0b11, (0, 1)), (0b1_0001, (0, 4)), (0b10_0000, (5,))]
)
def test_offered_types(bitmap: int, types: tuple[int, ...]) -> None:
    assert offered_vm_types(bitmap) == types


@pytest.mark.kvm
def test_probing_leaves_nothing_open(kvm: Kvm, fds: Callable[[], frozenset[str]]) -> None:
    before = fds()
    reports = probe(kvm)
    assert fds() == before
    found = {(report.capability.name, report.vm_type): report for report in reports}
    assert found["KVM_CAP_USER_MEMORY", None].value == 1
    assert found["KVM_CAP_NR_MEMSLOTS", 0].value
    assert {report.capability for report in reports} == set(CAPABILITIES)


@pytest.mark.kvm
def test_a_type_that_the_host_then_refuses_is_reported(kvm: Kvm, monkeypatch: pytest.MonkeyPatch) -> None:
    real_check, real_create = Kvm.check_extension, Kvm.create_vm

    def check(self: Kvm, cap: int) -> int:
        return 0b1_0001 if cap == uapi.KVM_CAP_VM_TYPES else real_check(self, cap)

    def create(self: Kvm, vm_type: int = 0) -> Vm:
        if vm_type == uapi.KVM_X86_SNP_VM:
            raise HostError("no firmware")
        return real_create(self, vm_type)

    monkeypatch.setattr(Kvm, "check_extension", check)
    monkeypatch.setattr(Kvm, "create_vm", create)
    refused = [report for report in probe(kvm) if report.vm_type == uapi.KVM_X86_SNP_VM]
    assert len(refused) == sum(capability.scope is Scope.VM for capability in CAPABILITIES)
    assert all(report.value is None and report.problem == "no firmware" for report in refused)


def test_missing_capability_is_a_host_error() -> None:
    assert issubclass(MissingCapability, HostError)
