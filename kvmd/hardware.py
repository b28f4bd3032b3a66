"""Builds the machine below the conversion service on KVM: memory, VM and vCPUs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvmd.devices.interrupt import InterruptLine
from kvmd.errors import BackendError, ConfigError, HostError, MissingCapability
from kvmd.host_choice import Choice, create_vm
from kvmd.hv.vcpu import Vcpu
from kvmd.kvm import uapi
from kvmd.kvm.capability_table import CAPABILITIES, Scope
from kvmd.kvm.fault_layout import choose_layout
from kvmd.kvm.guest_memfd import GuestMemfd
from kvmd.kvm.system import Kvm
from kvmd.kvm.vm import Vm
from kvmd.memory.backing import Backing
from kvmd.memory.host_memory import HostMemory
from kvmd.memory.page_state import PageStateMap
from kvmd.payload.boot import BootLayout, plan_boot
from kvmd.payload.elf import LoadedImage
from kvmd.protection.attribute_views import AttributeViews
from kvmd.protection.base import Protection
from kvmd.protection.emulated import EmulatedProtection
from kvmd.protection.guest_memfd import GuestMemfdProtection
from kvmd.protection.none import NoProtection
from kvmd.protection.two_views import Tripwire
from kvmd.ranges import GpaRange, PageState
from kvmd.spec.machine import MachineSpec
from kvmd.units import PAGE_SIZE, format_size

if TYPE_CHECKING:
    from kvmd.linux.boot import LinuxBoot

_QUIRK_SLOT_ZAP_ALL = 1 << 7
"""KVM_X86_QUIRK_SLOT_ZAP_ALL: deleting a memslot drops all shadow pages of the VM, not just those of the slot."""

_EXIT_HYPERCALL = "exit-hypercall"

_KERNEL_BYTES_PER_PAGE = 10
"""What KVM keeps for each page of a memslot: a reverse map entry and large-page counts (measured: 9.8 bytes)."""

_ATTRIBUTE_BYTES_PER_PAGE = 10
"""What KVM keeps for each page with an attribute: an entry in a table of 64 (struct xa_node, 576 bytes)."""


@dataclass(frozen=True, slots=True)
class DevicePlace:
    """Where a virtio device is, and what connects it to the accelerator.

    Attributes:
        window: its registers.
        gsi: its interrupt line's number.
        interrupt: the line.
        connect: has an eventfd (the first argument) written when the guest stores a number (the last one) in the 32
            bits at a gpa; raises BackendError.
    """

    window: GpaRange
    gsi: int
    interrupt: InterruptLine
    connect: Callable[[int, int, int], None]


@dataclass(frozen=True, slots=True)
class Platform:
    """What the devices of a Linux machine are connected to.

    Attributes:
        console: the serial port's interrupt line.
        button: the power button's: a pull presses it.
        places: one for each virtio device, in their order.
    """

    console: InterruptLine
    button: InterruptLine
    places: tuple[DevicePlace, ...] = ()


@dataclass(frozen=True, slots=True)
class Hardware:
    """An accelerator's part of a machine.

    Attributes:
        vcpus: in the order of their indices, ready to run.
        protection: makes conversions real.
        boot: where everything lies, and how the first vCPU starts.
        shared: host memory of the shared view.
        state: the state of each page, as the machine starts.
        pinned: memory that never converts, or has no other state.
        lock: the memory lock: held while memory changes hands, and by whoever reads ``state`` on another thread.
        facts: what the machine's first log line says.
        resources: closes all of it, in the right order.
        not_on_kvm: why not on KVM, where the operator left the choice to kvmd.
        platform: what a Linux guest's devices are connected to; a payload has none.
        hole: addresses below the end of ``state`` that are no memory, where a Linux guest has as much.
    """

    vcpus: list[Vcpu]
    protection: Protection
    boot: BootLayout | LinuxBoot
    shared: HostMemory
    state: PageStateMap
    pinned: GpaRange
    lock: threading.Lock
    facts: dict[str, object]
    resources: ExitStack
    not_on_kvm: str = ""
    platform: Platform | None = None
    hole: GpaRange | None = None

    @property
    def deletes_memslots(self) -> bool:
        """Tell whether a conversion deletes memslots, and waits for KVM then."""
        return isinstance(self.protection, EmulatedProtection)


def kvm_problem() -> str | None:
    """Return why no machine can be made with this host's KVM, in one line; None where one can."""
    try:
        with Kvm.open() as kvm, kvm.create_vm() as vm:
            for capability in CAPABILITIES:
                ask = kvm.check_extension if capability.scope is Scope.SYSTEM else vm.check_extension
                if capability.required and not ask(capability.number):
                    return f"this host's KVM lacks {capability.name}"
            return None
    except (HostError, BackendError) as error:
        return str(error)


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
        check_vcpus(kvm, spec.vcpus)
        try:
            vm, choice = create_vm(kvm, spec.protection, spec.tripwire)
            stack.enter_context(vm)
            enabled = enable_capabilities(vm)
            if choice.protection == "guest-memfd" and _EXIT_HYPERCALL not in enabled:
                # Forgetting it fails silently: KVM would answer the guest's requests itself, with -ENOSYS.
                raise MissingCapability(
                    "KVM_CAP_EXIT_HYPERCALL",
                    "protection guest-memfd needs KVM_CAP_EXIT_HYPERCALL with KVM_HC_MAP_GPA_RANGE, which this VM "
                    "lacks: use protection emulated",
                )
            boot = plan_boot(
                image,
                memory_size=spec.memory,
                vcpus=spec.vcpus,
                c_bit=kvm.physical_address_bits() - 1 if choice.tripwire is not None else None,
                gigabyte_pages=kvm.supports_gigabyte_pages(),
                cpl=spec.cpl,
                arguments=spec.arguments,
            )
            check_kernel_memory(spec.memory, choice)
            memory = MachineMemory.of(spec, boot, choice.protection, stack)
            protection = _protect(vm, memory, boot, choice, quiesce, stack)
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
        if choice.why:
            facts["protection_because"] = choice.why
        shared = memory.backings[PageState.SHARED]
        return Hardware(
            vcpus, protection, boot, shared, memory.state, memory.pinned, memory.lock, facts, stack.pop_all()
        )


@dataclass(frozen=True, slots=True)
class MachineMemory:
    """A machine's memory before any accelerator knows of it.

    Attributes:
        backings: host memory by side; private memory in a guest_memfd has none.
        state: the state of each page.
        pinned: see ``Hardware``.
        lock: see ``Hardware``.
        initial: the state of what is not pinned.
    """

    backings: dict[PageState, Backing]
    state: PageStateMap
    pinned: GpaRange
    lock: threading.Lock
    initial: PageState

    @classmethod
    def of(cls, spec: MachineSpec, boot: BootLayout, protection: str, stack: ExitStack) -> MachineMemory:
        """Map host memory and put the image into the side that it stays in."""
        two_views = boot.c_bit is not None
        shared = stack.enter_context(Backing("shared", spec.memory))
        backings = {PageState.SHARED: shared}
        if two_views:
            backings[PageState.PRIVATE] = stack.enter_context(Backing("private", spec.memory))
        # A VM of type SW_PROTECTED has no way to put contents into private memory, so the image stays shared there.
        pinned_state = PageState.PRIVATE if two_views else PageState.SHARED
        for write in boot.writes:
            backings[pinned_state].write(write.gpa, bytes(write.data))
        initial = PageState.SHARED if protection == "none" else PageState(spec.initial)
        pinned = GpaRange(0, spec.memory) if protection == "none" else boot.pinned
        state = PageStateMap(spec.memory, initial)
        if pinned_state is not initial:
            state.set(pinned, pinned_state, 0, explicit=False)
        return cls(backings, state, pinned, threading.Lock(), initial)


def _protect(
    vm: Vm,
    memory: MachineMemory,
    boot: BootLayout,
    choice: Choice,
    quiesce: Callable[[], AbstractContextManager[None]],
    stack: ExitStack,
) -> Protection:
    """Put the memory into memslots."""
    shared = memory.backings[PageState.SHARED]
    protection: EmulatedProtection[GuestMemfd] | AttributeViews[GuestMemfd] | GuestMemfdProtection[GuestMemfd]
    if choice.protection == "none":
        vm.set_memory_region(0, 0, shared.size_bytes, shared.address)
        return NoProtection(shared.size_bytes)
    if choice.tripwire is None or boot.c_bit is None:
        protection = GuestMemfdProtection(vm, shared, pinned=memory.pinned, state=memory.state, lock=memory.lock)
    elif choice.tripwire is Tripwire.ATTRIBUTE:
        protection = AttributeViews(vm, memory.backings, c_bit=boot.c_bit, state=memory.state)
    else:
        protection = EmulatedProtection(
            vm,
            memory.backings,
            pinned=memory.pinned,
            c_bit=boot.c_bit,
            tripwire=choice.tripwire,
            slot_count=memslot_count(vm),
            quiesce=quiesce,
            initial=memory.initial,
        )
    stack.callback(protection.close)
    return protection


def memslot_count(vm: Vm) -> int:
    """Return how many memslots the VM has."""
    return vm.check_extension(uapi.KVM_CAP_NR_MEMSLOTS)


def check_vcpus(kvm: Kvm, vcpus: int) -> None:
    """Refuse more vCPUs than KVM has. Raises ConfigError."""
    most = kvm.check_extension(uapi.KVM_CAP_MAX_VCPUS) or kvm.check_extension(uapi.KVM_CAP_NR_VCPUS) or 4
    if vcpus > most:
        raise ConfigError(f"vcpus: this host's KVM allows at most {most}, not {vcpus}")


def enable_capabilities(vm: Vm) -> list[str]:
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
        enabled.append(_EXIT_HYPERCALL)
    return enabled


def check_kernel_memory(memory: int, choice: Choice) -> None:
    """Refuse memory whose page tables and maps alone would exhaust the host: the kernel would not, it would swap."""
    views = 1 if choice.tripwire is None else 2
    marks = 1 if choice.protection == "guest-memfd" or choice.tripwire is Tripwire.ATTRIBUTE else 0
    needed = memory // PAGE_SIZE * (_KERNEL_BYTES_PER_PAGE * views + _ATTRIBUTE_BYTES_PER_PAGE * marks)
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
