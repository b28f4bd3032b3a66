"""Interrupt controllers, interrupt lines and notifications, on real KVM."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest

from kvmd.devices.interrupt import InterruptLine
from kvmd.errors import BackendError
from kvmd.kvm.fault_layout import MERGED
from kvmd.kvm.linux_cpuid import linux_cpuid
from kvmd.kvm.system import Kvm
from kvmd.kvm.vm import Vm

pytestmark = pytest.mark.kvm

TSS, IDENTITY_MAP = 0xFFFB_D000, 0xFFFB_C000
WINDOW = 0xD000_0050


@pytest.fixture
def line() -> Iterator[InterruptLine]:
    with InterruptLine() as line:
        yield line


@pytest.fixture
def with_controllers(vm: Vm) -> Vm:
    vm.create_interrupt_controllers(tss_gpa=TSS, identity_map_gpa=IDENTITY_MAP)
    return vm


def test_the_controllers_are_there_once(with_controllers: Vm) -> None:
    with pytest.raises(BackendError) as caught:
        with_controllers.create_interrupt_controllers(tss_gpa=TSS, identity_map_gpa=IDENTITY_MAP)
    assert caught.value.errno in {errno.EEXIST, errno.EINVAL}


def test_kvm_takes_every_pull_off_a_line(with_controllers: Vm, line: InterruptLine) -> None:
    with_controllers.connect_interrupt(line.fileno(), 4)
    for _ in range(3):
        line.pull()
    with pytest.raises(BlockingIOError):  # nothing is left of it: KVM was told each time
        os.eventfd_read(line.fileno())


def test_a_line_is_connected_once(with_controllers: Vm, line: InterruptLine) -> None:
    with_controllers.connect_interrupt(line.fileno(), 4)
    with pytest.raises(BackendError, match="connect an eventfd to interrupt line 4"):
        with_controllers.connect_interrupt(line.fileno(), 4)


def test_a_line_needs_controllers(vm: Vm, line: InterruptLine) -> None:
    with pytest.raises(BackendError, match="interrupt line 4"):
        vm.connect_interrupt(line.fileno(), 4)


def test_a_notification_has_its_address_and_value_to_itself(with_controllers: Vm, line: InterruptLine) -> None:
    with_controllers.connect_notification(line.fileno(), WINDOW, 0)
    with_controllers.connect_notification(line.fileno(), WINDOW, 1)
    with pytest.raises(BackendError, match=r"a store of 1 at 0xd0000050") as caught:
        with_controllers.connect_notification(line.fileno(), WINDOW, 1)
    assert caught.value.errno == errno.EEXIST


def test_kvm_takes_the_processors_of_a_linux_guest(kvm: Kvm, with_controllers: Vm) -> None:
    supported = kvm.supported_cpuid()
    for index in range(2):
        vcpu = with_controllers.create_vcpu(index, MERGED)
        try:
            vcpu.set_cpuid(linux_cpuid(supported, index=index, vcpus=2, tsc_deadline=True))
            vcpu.set_msrs({0x2FF: 1 << 11 | 6})
            vcpu.connect_local_interrupts()
        finally:
            vcpu.close()


def test_a_register_that_is_none_is_named(kvm: Kvm, with_controllers: Vm) -> None:
    vcpu = with_controllers.create_vcpu(0, MERGED)
    try:
        vcpu.set_cpuid(kvm.supported_cpuid())
        with pytest.raises(BackendError, match=r"register 0xdead0000 of vCPU 0"):
            vcpu.set_msrs({0x2FF: 1 << 11 | 6, 0xDEAD_0000: 1})
    finally:
        vcpu.close()
