"""Asking a host for the capabilities that kvmd cares about.

They are probed, never guessed from a version: distributions backport, and other hypervisors speak KVM's API.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvmd.errors import KvmdError
from kvmd.kvm import uapi
from kvmd.kvm.capability_table import CAPABILITIES, Capability, Scope
from kvmd.kvm.system import Kvm


@dataclass(frozen=True, slots=True)
class CapabilityReport:
    """What one probe found.

    Attributes:
        capability: what was asked for.
        vm_type: the type of VM that was asked (KVM_X86_*_VM), or None for the system.
        value: the answer, 0 for missing; None where there was nobody to ask.
        problem: why there was nobody to ask, or None.
    """

    capability: Capability
    vm_type: int | None
    value: int | None
    problem: str | None = None


def offered_vm_types(vm_types: int) -> tuple[int, ...]:
    """Return the types of VM in KVM_CAP_VM_TYPES' answer, a bitmap; the default one is always offered."""
    return tuple(t for t in range(vm_types.bit_length()) if vm_types >> t & 1) or (uapi.KVM_X86_DEFAULT_VM,)


def probe(kvm: Kvm) -> tuple[CapabilityReport, ...]:
    """Ask the host for everything in CAPABILITIES, and for each type of VM that it offers.

    Creates one VM of each type and closes it again. A type that cannot be created is reported, not raised: a
    host may offer what its firmware then refuses.

    Raises:
        BackendError: a question itself failed.
    """
    reports = [
        CapabilityReport(capability, None, kvm.check_extension(capability.number))
        for capability in CAPABILITIES
        if capability.scope is Scope.SYSTEM
    ]
    of_vms = [capability for capability in CAPABILITIES if capability.scope is Scope.VM]
    for vm_type in offered_vm_types(kvm.check_extension(uapi.KVM_CAP_VM_TYPES)):
        try:
            vm = kvm.create_vm(vm_type)
        except KvmdError as error:
            reports += [CapabilityReport(c, vm_type, None, str(error)) for c in of_vms]
            continue
        with vm:
            reports += [CapabilityReport(c, vm_type, vm.check_extension(c.number)) for c in of_vms]
    return tuple(reports)
