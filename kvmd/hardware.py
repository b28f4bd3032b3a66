"""Builds the machine below the conversion service: memory, VM and vCPUs, on the accelerator of this host."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

from kvmd.errors import BackendError, ConfigError, HostError, MissingCapability
from kvmd.hv.vcpu import Vcpu
from kvmd.kvm import uapi
from kvmd.kvm.fault_layout import choose_layout
from kvmd.kvm.system import Kvm
from kvmd.kvm.vm import Vm
from kvmd.memory.backing import Backing
from kvmd.payload.boot import BootLayout, plan_boot
from kvmd.payload.elf import LoadedImage
from kvmd.protection.base import Protection
from kvmd.protection.emulated import EmulatedProtection, Tripwire
from kvmd.protection.none import NoProtection
from kvmd.ranges import PageState
from kvmd.spec import MachineSpec
from kvmd.units import PAGE_SIZE, format_size

_QUIRK_SLOT_ZAP_ALL = 1 << 7
"""KVM_X86_QUIRK_SLOT_ZAP_ALL: deleting a memslot drops all shadow pages of the VM, not just those of the slot."""

_INIT_SHARED_AND_MMAP = 3
"""The two guest_memfd flags that a tripwire is created with (KVM_CAP_GUEST_MEMFD_FLAGS)."""

_KERNEL_BYTES_PER_PAGE = 10
"""What KVM keeps for each page of a memslot: a reverse map entry and large-page counts (measured: 9.8 bytes)."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """An accelerator's part of a machine.

    Attributes:
        vcpus: in the order of their indices, ready to run.
        protection: makes conversions real.
        boot: where everything lies.
        shared: host memory of the shared view.
        facts: what the machine's first log line says.
        resources: closes all of it, in the right order.
    """

    vcpus: list[Vcpu]
    protection: Protection
    boot: BootLayout
    shared: Backing
    facts: dict[str, object]
    resources: ExitStack


def open_kvm(spec: MachineSpec, image: LoadedImage, quiesce: Callable[[], AbstractContextManager[None]]) -> Hardware:
    """Build a machine on KVM.

    Args:
        spec: what it is made of.
        image: the guest, parsed.
        quiesce: a context in which no vCPU is inside KVM_RUN.

    Raises:
        HostError: this host cannot run it; nothing is left behind.
        ConfigError, ImageError: the spec does not fit the host or the image.
    """
    with ExitStack() as stack:
        kvm = stack.enter_context(Kvm.open())
        _check_vcpus(kvm, spec.vcpus)
        try:
            vm = stack.enter_context(kvm.create_vm())
            enabled = _enable_capabilities(vm)
            emulated = spec.protection == "emulated"
            c_bit = kvm.physical_address_bits() - 1 if emulated else None
            boot = plan_boot(
                image,
                memory_size=spec.memory,
                vcpus=spec.vcpus,
                c_bit=c_bit,
                gigabyte_pages=kvm.supports_gigabyte_pages(),
                cpl=spec.cpl,
                arguments=spec.arguments,
            )
            _check_kernel_memory(spec.memory, views=2 if emulated else 1)
            shared = stack.enter_context(Backing("shared", spec.memory))
            protection: Protection
            if c_bit is not None:
                private = stack.enter_context(Backing("private", spec.memory))
                _write_image(boot, private)
                tripwire = choose_tripwire(vm, spec.tripwire)
                emulation = EmulatedProtection(
                    vm,
                    {PageState.PRIVATE: private, PageState.SHARED: shared},
                    pinned=boot.pinned,
                    c_bit=c_bit,
                    tripwire=tripwire,
                    slot_count=memslot_count(vm),
                    quiesce=quiesce,
                )
                stack.callback(emulation.close)
                protection = emulation
            else:
                _write_image(boot, shared)
                vm.set_memory_region(0, 0, spec.memory, shared.address)
                protection = NoProtection(spec.memory)
            layout = choose_layout(memory_fault_info=vm.check_extension(uapi.KVM_CAP_MEMORY_FAULT_INFO) > 0)
            cpuid = kvm.supported_cpuid()
            vcpus: list[Vcpu] = []
            for index in range(spec.vcpus):
                vcpu = vm.create_vcpu(index, layout)
                stack.callback(vcpu.close)
                vcpu.set_cpuid(cpuid)
                vcpu.set_long_mode(cr3=boot.cr3, cpl=boot.cpl)
                vcpu.set_registers(boot.registers[index])
                vcpus.append(vcpu)
        except BackendError as error:
            raise HostError(f"this host's KVM refused to set up the machine: {error}") from error
        facts = {"accelerator": "kvm", "fault_layout": layout.name, **protection.facts(), "kvm_options": enabled}
        return Hardware(vcpus, protection, boot, shared, facts, stack.pop_all())


def choose_tripwire(vm: Vm, requested: str) -> Tripwire:
    """Return the tripwire to use: the requested one, or the best that the host offers.

    Raises:
        MissingCapability: the host lacks the requested one.
    """
    offered = vm.check_extension(uapi.KVM_CAP_GUEST_MEMFD_FLAGS) & _INIT_SHARED_AND_MMAP == _INIT_SHARED_AND_MMAP
    if requested == Tripwire.HOLE.value or (requested == "auto" and not offered):
        return Tripwire.HOLE
    if not offered:
        raise MissingCapability(
            "KVM_CAP_GUEST_MEMFD_FLAGS",
            "tripwire guest_memfd needs KVM_CAP_GUEST_MEMFD_FLAGS with MMAP and INIT_SHARED (Linux 6.18), which this "
            "host's KVM lacks: use --tripwire hole, or auto",
        )
    return Tripwire.GUEST_MEMFD


def memslot_count(vm: Vm) -> int:
    """Return how many memslots the VM has."""
    return vm.check_extension(uapi.KVM_CAP_NR_MEMSLOTS)


def _check_vcpus(kvm: Kvm, vcpus: int) -> None:
    most = kvm.check_extension(uapi.KVM_CAP_MAX_VCPUS) or kvm.check_extension(uapi.KVM_CAP_NR_VCPUS) or 4
    if vcpus > most:
        raise ConfigError(f"vcpus: this host's KVM allows at most {most}, not {vcpus}")


def _enable_capabilities(vm: Vm) -> list[str]:
    """Enable what makes conversions cheaper or failures clearer, where KVM offers it."""
    enabled = []
    if vm.check_extension(uapi.KVM_CAP_DISABLE_QUIRKS2) & _QUIRK_SLOT_ZAP_ALL:
        # A quarter of a conversion's time: without it, each deleted slot costs the guest all of its page tables.
        vm.enable_capability(uapi.KVM_CAP_DISABLE_QUIRKS2, _QUIRK_SLOT_ZAP_ALL)
        enabled.append("slot-zap-all-off")
    if vm.check_extension(uapi.KVM_CAP_EXIT_ON_EMULATION_FAILURE):
        # Otherwise KVM gives the guest a #UD, and all that is seen of it is a triple fault.
        vm.enable_capability(uapi.KVM_CAP_EXIT_ON_EMULATION_FAILURE, 1)
        enabled.append("exit-on-emulation-failure")
    if vm.check_extension(uapi.KVM_CAP_EXIT_HYPERCALL) & (1 << uapi.KVM_HC_MAP_GPA_RANGE):
        vm.enable_capability(uapi.KVM_CAP_EXIT_HYPERCALL, 1 << uapi.KVM_HC_MAP_GPA_RANGE)
        enabled.append("exit-hypercall")
    return enabled


def _check_kernel_memory(memory: int, *, views: int) -> None:
    """Refuse memory whose page tables and maps alone would exhaust the host: the kernel would not, it would swap."""
    needed = memory // PAGE_SIZE * _KERNEL_BYTES_PER_PAGE * views
    available = _available_memory()
    if available is not None and needed > available * 3 // 4:
        raise HostError(
            f"memory: {format_size(memory)} of guest memory need {format_size(needed)} in KVM before the guest touches "
            f"any of it, and this host has {format_size(available)} available: ask for less"
        )


def _available_memory() -> int | None:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:  # noqa: PTH123 - /proc needs no path handling
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _write_image(boot: BootLayout, backing: Backing) -> None:
    for write in boot.writes:
        backing.write(write.gpa, bytes(write.data))
