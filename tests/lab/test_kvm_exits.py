"""The kernel's private_mem_kvm_exits_test, and what the attributes of kvmd's own VM do to a guest."""

from __future__ import annotations

import ctypes
import errno
import threading
from collections.abc import Iterator

import pytest

from kvmd.errors import BackendError
from kvmd.hv.exits import MemoryFault, PortIo
from kvmd.kvm import uapi
from kvmd.kvm.system import Kvm
from kvmd.kvm.vm import Vm
from kvmd.ranges import GpaRange
from tests.protection.on_kvm import GPA, LOAD_AND_COUNT, PAGE, OnKvm, on_kvm

pytestmark = [pytest.mark.kvm, pytest.mark.private_memory]

PRIVATE = uapi.KVM_MEMORY_ATTRIBUTE_PRIVATE


@pytest.fixture
def guest(kvm: Kvm, protected_vm: Vm) -> Iterator[OnKvm]:
    """Yield the contract tests' guest in a VM whose pages have attributes."""
    with on_kvm(kvm, protected_vm) as guest:
        yield guest


def page(number: int) -> GpaRange:
    return GpaRange.of_size(GPA + number * PAGE, PAGE)


def test_a_private_access_to_a_slot_without_guest_memfd(protected_vm: Vm, guest: OnKvm) -> None:
    guest.set(0, GPA, 4 * PAGE, guest.address)
    protected_vm.set_memory_attributes(page(1), PRIVATE)
    assert isinstance(guest.exit_at(GPA), PortIo)
    for _again in range(3):
        assert guest.exit_at(GPA + PAGE + 8) == MemoryFault(GPA + PAGE, PAGE, private=True)
    assert isinstance(guest.exit_at(GPA + 2 * PAGE), PortIo)
    protected_vm.set_memory_attributes(page(1), 0)
    assert isinstance(guest.exit_at(GPA + PAGE), PortIo)


def test_a_private_access_to_a_slot_that_is_deleted_meanwhile(protected_vm: Vm, guest: OnKvm) -> None:
    protected_vm.set_memory_attributes(GpaRange.of_size(GPA, 4 * PAGE), PRIVATE)
    with protected_vm.create_guest_memfd(4 * PAGE) as memfd:
        guest.set(0, GPA, 4 * PAGE, guest.address, memfd=memfd)
        assert isinstance(guest.exit_at(GPA + PAGE), PortIo)
        guest.put(LOAD_AND_COUNT, rbx=GPA + PAGE)

        def delete() -> None:
            guest.wait_for_count(1000)
            guest.delete(0)

        deleter = threading.Thread(target=delete)
        deleter.start()
        # It runs until its memory is gone: nothing else makes it leave.
        assert guest.run() == MemoryFault(GPA + PAGE, PAGE, private=True)
        deleter.join()


def test_attributes_outlive_a_slot(protected_vm: Vm, guest: OnKvm) -> None:
    protected_vm.set_memory_attributes(page(0), PRIVATE)
    for _ in range(2):
        guest.set(0, GPA, PAGE, guest.address)
        assert guest.exit_at(GPA) == MemoryFault(GPA, PAGE, private=True)
        guest.delete(0)
    protected_vm.set_memory_attributes(page(0), 0)
    guest.set(0, GPA, PAGE, guest.address)
    assert isinstance(guest.exit_at(GPA), PortIo)


def test_holes_have_attributes_too_and_unknown_ones_are_refused(protected_vm: Vm) -> None:
    protected_vm.set_memory_attributes(GpaRange.of_size(1 << 50, PAGE), PRIVATE)
    protected_vm.set_memory_attributes(GpaRange.of_size(1 << 50, PAGE), 0)
    for attributes in (1, 1 << 4, 1 << 63):
        with pytest.raises(BackendError, check=lambda error: error.errno == errno.EINVAL):
            protected_vm.set_memory_attributes(page(0), attributes)


def test_what_the_attribute_says_is_what_the_guest_finds(protected_vm: Vm, guest: OnKvm) -> None:
    ctypes.memset(guest.address, 0x5A, 2 * PAGE)
    with protected_vm.create_guest_memfd(2 * PAGE) as memfd:
        guest.set(0, GPA, 2 * PAGE, guest.address, memfd=memfd)
        seen = []
        for attributes in (0, PRIVATE, 0):
            protected_vm.set_memory_attributes(page(0), attributes)
            exit_ = guest.exit_at(GPA)
            assert isinstance(exit_, PortIo)
            seen.append(exit_.data)
        assert seen == [b"\x5a", b"\0", b"\x5a"]
