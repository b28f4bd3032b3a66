from __future__ import annotations

import errno
import fcntl
from collections.abc import Callable

import pytest

from kvmd.errors import BackendError, MissingCapability
from kvmd.hv.exits import MemoryFault, PortIo
from kvmd.kvm import uapi
from kvmd.kvm import vm as subject
from kvmd.kvm.fault_layout import MERGED
from kvmd.kvm.ioctl import raw_ioctl
from kvmd.kvm.system import Kvm
from kvmd.kvm.vcpu import KvmVcpu
from kvmd.kvm.vm import Vm
from kvmd.ranges import GpaRange
from tests.gate import Facility, require

pytestmark = pytest.mark.kvm

TRIPWIRE = uapi.GUEST_MEMFD_FLAG_MMAP | uapi.GUEST_MEMFD_FLAG_INIT_SHARED
GPA = 0x200000
STORE_THEN_OUT = b"\x88\x04\x25\x00\x00\x20\x00\xe6\x12"  # mov [0x200000], al; out 0x12, al


def need_tripwires(vm: Vm) -> None:
    flags = vm.check_extension(uapi.KVM_CAP_GUEST_MEMFD_FLAGS)
    missing = f"KVM_CAP_GUEST_MEMFD_FLAGS is {flags}: no tripwires in a plain VM"
    require(Facility.KVM, None if flags & TRIPWIRE == TRIPWIRE else missing)


def test_an_overlap_is_told_with_its_slot(vm: Vm, ram: int) -> None:
    vm.set_memory_region(0, 0, 0x10000, ram)
    with pytest.raises(BackendError, match=r"cannot set memslot 1 to \[0x1000, 0x2000\) at") as caught:
        vm.set_memory_region(1, 0x1000, 0x1000, ram)
    assert caught.value.errno == errno.EEXIST
    assert isinstance(caught.value.__cause__, OSError)


def test_a_deleted_slot_makes_room(vm: Vm, ram: int) -> None:
    vm.set_memory_region(0, 0, 0x1000, ram)
    vm.delete_memory_region(0)
    vm.set_memory_region(1, 0, 0x1000, ram)
    with pytest.raises(BackendError, match="cannot delete memslot 0") as caught:
        vm.delete_memory_region(0)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize(("gpa", "size"), [(0x800, 0x1000), (0, 0x800), (2**64 - 0x1000, 0x2000)])
def test_a_misaligned_or_wrapping_slot_is_refused(vm: Vm, ram: int, gpa: int, size: int) -> None:
    with pytest.raises(BackendError, match="Invalid argument"):
        vm.set_memory_region(0, gpa, size, ram)


def test_the_old_ioctl_serves_kernels_without_region2(kvm: Kvm, ram: int, monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[int] = []
    monkeypatch.setattr(Vm, "check_extension", lambda _self, _cap: 0)

    def spy(fd: int, request: int, argument: int) -> int:
        requests.append(request)
        return raw_ioctl(fd, request, argument)

    monkeypatch.setattr(subject, "raw_ioctl", spy)
    with kvm.create_vm() as vm:
        vm.set_memory_region(0, 0, 0x1000, ram)
        vm.delete_memory_region(0)
        assert requests == [uapi.KVM_SET_USER_MEMORY_REGION] * 2
        with vm.create_guest_memfd(0x1000) as memfd, pytest.raises(MissingCapability) as caught:
            vm.set_memory_region(0, 0, 0x1000, ram, guest_memfd=memfd)
    assert caught.value.capability == "KVM_CAP_USER_MEMORY2"


def test_a_closed_guest_memfd_is_a_tripwire(vm: Vm, ram: int, boot: Callable[..., KvmVcpu]) -> None:
    need_tripwires(vm)
    vcpu = boot(STORE_THEN_OUT, rax=0x41)
    with vm.create_guest_memfd(0x2000, TRIPWIRE) as memfd:
        vm.set_memory_region(7, GPA, 0x2000, ram, guest_memfd=memfd)
    for _again in range(3):
        assert vcpu.run() == MemoryFault(GPA, 0x1000, private=False)
    vm.delete_memory_region(7)
    vm.set_memory_region(7, GPA, 0x1000, ram + 0x80000)
    assert vcpu.run() == PortIo(0x12, 1, 1, is_write=True, data=b"A")


def test_a_tripwire_is_disarmed_by_no_child_process(vm: Vm) -> None:
    need_tripwires(vm)
    with vm.create_guest_memfd(0x1000, TRIPWIRE) as memfd:
        assert fcntl.fcntl(memfd.fileno(), fcntl.F_GETFD) & fcntl.FD_CLOEXEC


def test_punching_a_hole(vm: Vm) -> None:
    need_tripwires(vm)
    with vm.create_guest_memfd(0x4000, TRIPWIRE) as memfd:
        assert memfd.size == 0x4000
        memfd.punch_hole(0x1000, 0x2000)
        with pytest.raises(BackendError, match="punch a hole of 0x1000 bytes at 0x800") as caught:
            memfd.punch_hole(0x800, 0x1000)
        assert caught.value.errno == errno.EINVAL
    with pytest.raises(ValueError, match="guest_memfd is used after it was closed"):
        memfd.punch_hole(0, 0x1000)


def test_a_misaligned_guest_memfd_is_refused(vm: Vm) -> None:
    need_tripwires(vm)
    with pytest.raises(BackendError, match="create a guest_memfd of 0x800 bytes with flags 0x0"):
        vm.create_guest_memfd(0x800)


def test_attributes_where_the_kernel_lacks_them(vm: Vm) -> None:
    if vm.check_extension(uapi.KVM_CAP_MEMORY_ATTRIBUTES):
        pytest.skip("this KVM has memory attributes for plain VMs")
    with pytest.raises((BackendError, MissingCapability), match=r"set attributes 0x8 on \[0x0, 0x1000\)"):
        vm.set_memory_attributes(GpaRange(0, 0x1000), uapi.KVM_MEMORY_ATTRIBUTE_PRIVATE)


def test_an_ioctl_that_the_kernel_does_not_know_is_a_missing_capability(
    vm: Vm, monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown = 0xAEFF
    monkeypatch.setattr(subject, "KVM_CREATE_GUEST_MEMFD", unknown)
    monkeypatch.setattr(subject, "KVM_SET_MEMORY_ATTRIBUTES", unknown)
    with pytest.raises(MissingCapability, match="lacks KVM_CAP_GUEST_MEMFD"):
        vm.create_guest_memfd(0x1000)
    with pytest.raises(MissingCapability, match="lacks KVM_CAP_MEMORY_ATTRIBUTES"):
        vm.set_memory_attributes(GpaRange(0, 0x1000), 0)


def test_enabling_capabilities(vm: Vm) -> None:
    if vm.check_extension(uapi.KVM_CAP_EXIT_HYPERCALL) & 1 << uapi.KVM_HC_MAP_GPA_RANGE:
        vm.enable_capability(uapi.KVM_CAP_EXIT_HYPERCALL, 1 << uapi.KVM_HC_MAP_GPA_RANGE)
    with pytest.raises(BackendError, match=r"enable KVM_CAP_EXIT_HYPERCALL with \(1,\)") as caught:
        vm.enable_capability(uapi.KVM_CAP_EXIT_HYPERCALL, 1)
    assert caught.value.errno == errno.EINVAL


def test_a_vcpu_number_is_used_once(vm: Vm, fds: Callable[[], frozenset[str]]) -> None:
    vcpu = vm.create_vcpu(0, MERGED)
    before = fds()
    with pytest.raises(BackendError, match="cannot create vCPU 0: File exists") as caught:
        vm.create_vcpu(0, MERGED)
    assert caught.value.errno == errno.EEXIST
    assert fds() == before
    vcpu.close()


def test_a_closed_vm_says_so(vm: Vm) -> None:
    vm.close()
    with pytest.raises(ValueError, match="virtual machine is used after it was closed"):
        vm.delete_memory_region(0)
