"""Which protection a machine gets on this host, and the VM of the type that this takes."""

from __future__ import annotations

from dataclasses import dataclass

from kvmd.errors import MissingCapability
from kvmd.kvm import uapi
from kvmd.kvm.needs import ATTRIBUTE_TRIPWIRE, GUEST_MEMFD, GUEST_MEMFD_TRIPWIRE, Need, first_lacking
from kvmd.kvm.system import Kvm
from kvmd.kvm.vm import Vm
from kvmd.protection.two_views import Tripwire


@dataclass(frozen=True, slots=True)
class Choice:
    """What a machine gets.

    Attributes:
        protection: ``guest-memfd``, ``emulated`` or ``none``.
        tripwire: of an emulated one, else None.
        why: where the operator left the choice to kvmd, what decided.
    """

    protection: str
    tripwire: Tripwire | None = None
    why: str = ""


def create_vm(kvm: Kvm, protection: str, tripwire: str) -> tuple[Vm, Choice]:
    """Create the VM for a machine.

    Args:
        kvm: this host's.
        protection: as in the machine's spec; ``auto`` for the strongest that the host offers.
        tripwire: as in the machine's spec; ``auto`` for the best that the host offers.

    Raises:
        MissingCapability: the host lacks what was asked for.
        HostError: no VM can be created.
        BackendError: KVM could not be asked.
    """
    if protection == "none":
        return kvm.create_vm(), Choice("none")
    why = ""
    if protection in {"guest-memfd", "auto"}:
        found = _software_protected_vm(kvm, GUEST_MEMFD)
        if isinstance(found, Vm):
            auto = "auto: the strongest that kvmd can use, and this host's KVM has all it needs"
            return found, Choice("guest-memfd", why=auto if protection == "auto" else "")
        if protection == "guest-memfd":
            raise MissingCapability(
                found.capability,
                f"protection guest-memfd needs {found}, which this host's KVM lacks: use protection emulated, or auto",
            )
        why = f"auto: guest-memfd would be stronger, but this host's KVM lacks {found}"
    vm, kind = _vm_with_tripwire(kvm, tripwire)
    return vm, Choice("emulated", kind, why)


def _vm_with_tripwire(kvm: Kvm, requested: str) -> tuple[Vm, Tripwire]:
    """Return a VM and the tripwire to use in it: the requested one, or the best that the host offers."""
    if requested in {Tripwire.ATTRIBUTE.value, "auto"}:
        found = _software_protected_vm(kvm, ATTRIBUTE_TRIPWIRE)
        if isinstance(found, Vm):
            return found, Tripwire.ATTRIBUTE
        if requested != "auto":
            raise _missing_tripwire(requested, found)
    vm = kvm.create_vm()
    if requested == Tripwire.HOLE.value:
        return vm, Tripwire.HOLE
    lacking = first_lacking(GUEST_MEMFD_TRIPWIRE, vm.check_extension)
    if lacking is None:
        return vm, Tripwire.GUEST_MEMFD
    if requested == "auto":
        return vm, Tripwire.HOLE
    vm.close()
    raise _missing_tripwire(requested, lacking)


def _software_protected_vm(kvm: Kvm, needs: tuple[Need, ...]) -> Vm | Need:
    """Return a VM with memory attributes that meets the needs, or the first that cannot be met."""
    vm_type, *others = needs
    if lacking := first_lacking((vm_type,), kvm.check_extension):
        return lacking
    try:
        vm = kvm.create_vm(uapi.KVM_X86_SW_PROTECTED_VM)
    except MissingCapability:
        return vm_type
    # What a VM can do depends on its type, so this one is asked, not the system.
    if lacking := first_lacking(tuple(others), vm.check_extension):
        vm.close()
        return lacking
    return vm


def _missing_tripwire(requested: str, lacking: Need) -> MissingCapability:
    return MissingCapability(
        lacking.capability,
        f"tripwire {requested} needs {lacking}, which this host's KVM lacks: use another one, or auto",
    )
