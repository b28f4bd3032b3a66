"""Builds the machine below the conversion service on the software CPU: memory, views and vCPUs."""

from __future__ import annotations

from contextlib import ExitStack

from kvmd.errors import ConfigError, HostError, MissingCapability
from kvmd.hardware import Hardware, MachineMemory
from kvmd.hv.vcpu import Vcpu
from kvmd.payload.boot import plan_boot
from kvmd.payload.elf import LoadedImage
from kvmd.protection.none import NoProtection
from kvmd.protection.software_views import SoftwareViews
from kvmd.ranges import PageState
from kvmd.software.availability import missing_emulator
from kvmd.software.memory import GuestMemory
from kvmd.spec.machine import MachineSpec

C_BIT = 47
"""Of guest-physical addresses. The emulator has more bits; no guest has more memory:
``kvmd.spec.machine.MEMORY_LIMIT``."""

MOST_VCPUS = 256
"""As many as there are APIC ids. An emulator takes about 3 MiB before it runs anything."""


def open_software(spec: MachineSpec, image: LoadedImage, why: str = "") -> Hardware:
    """Build a machine on the software CPU.

    Args:
        spec: what it is made of.
        image: the guest, parsed.
        why: why not on KVM, where that was left to kvmd.

    Raises:
        HostError: this host cannot run it; nothing is left behind.
        ConfigError, ImageError: the spec does not fit the software CPU or the image.
    """
    problem = missing_emulator()
    if problem is not None:
        raise HostError(f"{why}; and for the software CPU, {problem}" if why else f"accelerator software: {problem}")
    _check(spec, why)
    from kvmd.software.vm import SoftwareVm  # noqa: PLC0415 - only now: without the package this import fails

    protected = spec.protection != "none"
    with ExitStack() as stack:
        boot = plan_boot(
            image,
            memory_size=spec.memory,
            vcpus=spec.vcpus,
            c_bit=C_BIT if protected else None,
            gigabyte_pages=True,
            cpl=spec.cpl,
            arguments=spec.arguments,
        )
        memory = MachineMemory.of(spec, boot, "emulated" if protected else "none", stack)
        shared = memory.backings[PageState.SHARED]
        guest = GuestMemory(
            spec.memory,
            {view: backing.address for view, backing in memory.backings.items()},
            c_bit=boot.c_bit,
            initial=memory.initial,
        )
        vm = SoftwareVm(guest)
        stack.callback(vm.close)
        if protected and memory.initial is PageState.SHARED:
            guest.make_live(memory.pinned, PageState.PRIVATE)
        shared.on_write = lambda range_: vm.note_written(range_, PageState.SHARED)
        protection: NoProtection | SoftwareViews = NoProtection(spec.memory)
        if boot.c_bit is not None:
            protection = SoftwareViews(vm, memory.backings, c_bit=boot.c_bit)
        vcpus: list[Vcpu] = []
        for index in range(spec.vcpus):
            vcpu = vm.create_vcpu(index)
            stack.callback(vcpu.close)
            vcpu.set_long_mode(cr3=boot.cr3, cpl=boot.cpl)
            vcpu.set_registers(boot.registers[index])
            vcpus.append(vcpu)
        facts = {"accelerator": "software", **protection.facts()}
        resources = stack.pop_all()
        return Hardware(
            vcpus, protection, boot, shared, memory.state, memory.pinned, memory.lock, facts, resources, why
        )


def _check(spec: MachineSpec, why: str) -> None:
    """Refuse what only KVM has."""
    because = f" (no KVM: {why})" if why else ""
    if spec.protection == "guest-memfd":
        raise MissingCapability(
            "KVM_CAP_GUEST_MEMFD",
            f"protection guest-memfd needs KVM, and this is the software CPU{because}: use protection emulated, "
            "or auto",
        )
    if spec.tripwire != "auto":
        raise HostError(
            f"tripwire {spec.tripwire} needs KVM, and this is the software CPU, which needs none{because}: use auto"
        )
    if spec.vcpus > MOST_VCPUS:
        raise ConfigError(f"vcpus: the software CPU allows at most {MOST_VCPUS}, not {spec.vcpus}")
