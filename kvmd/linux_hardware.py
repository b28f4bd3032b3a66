"""Builds a Linux machine below its devices on KVM: memory, VM, interrupt controllers, vCPUs."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from dataclasses import dataclass

from kvmd.acpi.tables import AcpiMachine, VirtioWindow, build_tables
from kvmd.devices.interrupt import InterruptLine
from kvmd.devices.power import PANIC_PORT, RESET_PORT, RESET_VALUE, SLEEP_PORT, SLEEP_TYPE_OFF
from kvmd.errors import BackendError, ConfigError, HostError
from kvmd.hardware import DevicePlace, Hardware, Platform, check_kernel_memory, check_vcpus, enable_capabilities
from kvmd.host_choice import Choice, create_vm
from kvmd.hv.vcpu import Vcpu
from kvmd.kvm import uapi
from kvmd.kvm.fault_layout import choose_layout
from kvmd.kvm.guest_memfd import GuestMemfd
from kvmd.kvm.linux_cpuid import linux_cpuid
from kvmd.kvm.system import Kvm
from kvmd.kvm.vcpu import KvmVcpu
from kvmd.kvm.vm import Vm
from kvmd.linux.address_map import (
    ACPI_TABLES,
    BUTTON_GSI,
    COM1,
    COM1_GSI,
    DEVICE_GSIS,
    DEVICE_SIZE,
    DEVICES_START,
    IDENTITY_MAP,
    IOAPIC,
    LOCAL_APIC,
    LOW_MEMORY_END,
    TSS,
)
from kvmd.linux.boot import LinuxBoot, LinuxWrite, plan_linux
from kvmd.linux.kernel import Kernel
from kvmd.memory.anonymous import AnonymousMemory
from kvmd.memory.backing import Backing
from kvmd.memory.host_memory import HostMemory
from kvmd.memory.page_state import PageStateMap
from kvmd.protection.base import Protection
from kvmd.protection.guest_memfd import GuestMemfdProtection
from kvmd.protection.none import NoProtection
from kvmd.ranges import GpaRange, PageState
from kvmd.spec.machine import MachineSpec
from kvmd.units import MIB, format_size

_PINNED = GpaRange(0, MIB)
"""What firmware would have left there, ACPI's tables among it, never turns private."""

_MSRS = {
    0x1A0: 1 << 0,  # IA32_MISC_ENABLE: fast strings
    0x2FF: 1 << 11 | 6,  # IA32_MTRR_DEF_TYPE: enabled, write-back, as firmware leaves it
}


@dataclass(frozen=True, slots=True)
class LinuxImage:
    """A Linux guest, parsed.

    Attributes:
        kernel: its kernel.
        initrd: the whole file; empty for none.
    """

    kernel: Kernel
    initrd: bytes


def open_linux(spec: MachineSpec, image: LinuxImage, *, devices: int) -> Hardware:
    """Build a Linux machine on KVM, as ``kvmd.accelerator.open_linux_hardware`` says."""
    if devices > len(DEVICE_GSIS):
        raise ConfigError(f"{devices} devices are too many: a machine has interrupt lines for {len(DEVICE_GSIS)}")
    if spec.protection == "guest-memfd" and spec.memory > LOW_MEMORY_END:
        raise ConfigError(
            f"memory: with protection guest-memfd Linux has at most {format_size(LOW_MEMORY_END)}, the memory below "
            "its devices"
        )
    boot = plan_linux(
        image.kernel,
        memory_size=spec.memory,
        initrd=image.initrd,
        command_line=spec.cmdline,
        acpi=_acpi(spec.vcpus, devices),
        reset_port=(RESET_PORT, RESET_VALUE),
    )
    with ExitStack() as stack:
        kvm = stack.enter_context(Kvm.open())
        check_vcpus(kvm, spec.vcpus)
        try:
            vm, choice = create_vm(kvm, spec.protection, spec.tripwire)
            stack.enter_context(vm)
            enabled = enable_capabilities(vm)
            vm.create_interrupt_controllers(tss_gpa=TSS, identity_map_gpa=IDENTITY_MAP)
            check_kernel_memory(spec.memory, choice)
            state, lock = PageStateMap(boot.memory[-1].end, PageState.SHARED), threading.Lock()
            shared, protection = _memory(vm, boot, state, lock, choice, stack)
            platform = _platform(vm, devices, stack)
            vcpus = _vcpus(kvm, vm, spec.vcpus, boot, stack)
        except BackendError as error:
            raise HostError(f"this host's KVM refused to set up the machine: {error}") from error
        pinned = _PINNED if choice.protection == "guest-memfd" else state.range
        facts = {
            "accelerator": "kvm",
            "boot_protocol": boot.protocol,
            **protection.facts(),
            "kvm_options": enabled,
        }
        hole = None if len(boot.memory) == 1 else GpaRange(boot.memory[0].end, boot.memory[1].start)
        return Hardware(
            *(vcpus, protection, boot, shared, state, pinned, lock, facts, stack.pop_all()),
            platform=platform,
            hole=hole,
        )


def _acpi(vcpus: int, devices: int) -> LinuxWrite:
    machine = AcpiMachine(
        processors=vcpus,
        local_apic=LOCAL_APIC,
        ioapic=IOAPIC,
        serial_port=(COM1, COM1_GSI),
        sleep_port=SLEEP_PORT,
        sleep_type=SLEEP_TYPE_OFF,
        reset_port=RESET_PORT,
        reset_value=RESET_VALUE,
        panic_port=PANIC_PORT,
        button_gsi=BUTTON_GSI,
        virtio=[
            VirtioWindow(DEVICES_START + index * DEVICE_SIZE, DEVICE_SIZE, DEVICE_GSIS[index])
            for index in range(devices)
        ],
    )
    tables = build_tables(machine, gpa=ACPI_TABLES.start, limit_bytes=ACPI_TABLES.size_bytes)
    return LinuxWrite(ACPI_TABLES.start, tables)


def _memory(
    vm: Vm, boot: LinuxBoot, state: PageStateMap, lock: threading.Lock, choice: Choice, stack: ExitStack
) -> tuple[HostMemory, Protection]:
    """Map host memory, put the guest into it, and it into memslots.

    The devices' addresses between two ranges of it stay a hole.
    """
    if choice.protection == "none":
        anonymous = stack.enter_context(AnonymousMemory("shared", state.range.size_bytes))
        _load(boot, anonymous)
        for slot, range_ in enumerate(boot.memory):
            vm.set_memory_region(slot, range_.start, range_.size_bytes, anonymous.address_of(range_.start))
        return anonymous, NoProtection(anonymous.size_bytes)
    shared = stack.enter_context(Backing("shared", state.range.size_bytes))
    _load(boot, shared)
    protection: GuestMemfdProtection[GuestMemfd] = GuestMemfdProtection(
        vm, shared, pinned=_PINNED, state=state, lock=lock
    )
    stack.callback(protection.close)
    return shared, protection


def _load(boot: LinuxBoot, memory: HostMemory) -> None:
    for write in boot.writes:
        memory.write(write.gpa, bytes(write.data))


def _platform(vm: Vm, devices: int, stack: ExitStack) -> Platform:
    """Connect interrupt lines and notifications."""
    console = stack.enter_context(InterruptLine())
    vm.connect_interrupt(console.fileno(), COM1_GSI)
    button = stack.enter_context(InterruptLine())
    vm.connect_interrupt(button.fileno(), BUTTON_GSI)
    places = []
    for index, gsi in zip(range(devices), DEVICE_GSIS, strict=False):
        window = GpaRange.of_size(DEVICES_START + index * DEVICE_SIZE, DEVICE_SIZE)
        interrupt = stack.enter_context(InterruptLine())
        vm.connect_interrupt(interrupt.fileno(), gsi)
        places.append(DevicePlace(window, gsi, interrupt, vm.connect_notification))
    return Platform(console, button, tuple(places))


def _vcpus(kvm: Kvm, vm: Vm, count: int, boot: LinuxBoot, stack: ExitStack) -> list[Vcpu]:
    """Create the vCPUs: the first starts the kernel, the others wait until it starts them (INIT, SIPI)."""
    layout = choose_layout(memory_fault_info=vm.check_extension(uapi.KVM_CAP_MEMORY_FAULT_INFO) > 0)
    supported = kvm.supported_cpuid()
    deadline = kvm.check_extension(uapi.KVM_CAP_TSC_DEADLINE_TIMER) > 0
    vcpus: list[Vcpu] = []
    for index in range(count):
        vcpu = vm.create_vcpu(index, layout)
        stack.callback(vcpu.close)
        vcpu.set_cpuid(linux_cpuid(supported, index=index, vcpus=count, tsc_deadline=deadline))
        vcpu.set_msrs(_MSRS)
        vcpu.connect_local_interrupts()
        if index == 0:
            _start(vcpu, boot)
        vcpus.append(vcpu)
    return vcpus


def _start(vcpu: KvmVcpu, boot: LinuxBoot) -> None:
    if boot.mode == "long":
        vcpu.set_long_mode(cr3=boot.cr3, cpl=0, gdt=boot.gdt)
    else:
        vcpu.set_protected_mode(gdt=boot.gdt)
    vcpu.set_registers(boot.registers)
