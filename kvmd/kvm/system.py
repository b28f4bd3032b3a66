"""The KVM device: what this host can do, and new virtual machines."""

from __future__ import annotations

import ctypes
import errno as errno_codes
import grp
import os
import stat
from typing import Self

from kvmd.closing import Closing
from kvmd.errors import BackendError, HostError, MissingCapability
from kvmd.kvm.capability_table import VM_TYPE_NAMES, capability_name
from kvmd.kvm.cpuid import CpuidEntry, empty_table, physical_address_bits, read_table, supports_gigabyte_pages
from kvmd.kvm.fd import OwnedFd
from kvmd.kvm.ioctl import ioctl, raw_ioctl
from kvmd.kvm.uapi import (
    KVM_API_VERSION,
    KVM_CHECK_EXTENSION,
    KVM_CREATE_VM,
    KVM_GET_API_VERSION,
    KVM_GET_SUPPORTED_CPUID,
    KVM_GET_VCPU_MMAP_SIZE,
    KVM_X86_DEFAULT_VM,
)
from kvmd.kvm.vm import Vm

_MODPROBE = "load the module with 'modprobe kvm_intel' or 'modprobe kvm_amd'"
_NESTED = "inside a virtual machine, turn on nested virtualisation in its host first"
_CONTAINER = "inside a container, start it with --device=/dev/kvm"

_CPUID_CAPACITY = 128
_CPUID_CAPACITY_LIMIT = 4096


class Kvm(Closing):
    """An open KVM device (Documentation/virt/kvm/api.rst, 4. API description, system ioctls).

    Make one with ``Kvm.open``.
    """

    def __init__(self, fd: OwnedFd, vcpu_mmap_size: int) -> None:
        self._fd = fd
        self._vcpu_mmap_size = vcpu_mmap_size
        # Asked three times for each machine, and it takes a millisecond.
        self._cpuid: tuple[CpuidEntry, ...] = ()

    @classmethod
    def open(cls, path: str = "/dev/kvm") -> Self:
        """Open the device at ``path``.

        Raises:
            HostError: it is missing, forbidden, no KVM device or one of another API; the message is one line
                that says how to mend it.
        """
        try:
            fd = OwnedFd(os.open(path, os.O_RDWR | os.O_CLOEXEC), path)
        except OSError as error:
            raise HostError(_remedy(path, error)) from error
        try:
            version = ioctl(fd.fileno(), KVM_GET_API_VERSION, 0, "ask for the API version")
            mmap_size = ioctl(fd.fileno(), KVM_GET_VCPU_MMAP_SIZE, 0, "ask for the size of kvm_run")
        except OSError as error:
            fd.close()
            raise HostError(
                f"{path} is not a KVM device ({os.strerror(error.errno or 0)}): "
                f"use /dev/kvm, or {_MODPROBE} and let udev create it"
            ) from error
        if version != KVM_API_VERSION:
            fd.close()
            raise HostError(
                f"{path} speaks version {version} of the KVM API, kvmd needs {KVM_API_VERSION}: "
                "use Linux 2.6.22 or later"
            )
        return cls(fd, mmap_size)

    @property
    def vcpu_mmap_size(self) -> int:
        """Bytes that each vCPU shares with the kernel (4.5 KVM_GET_VCPU_MMAP_SIZE)."""
        return self._vcpu_mmap_size

    def check_extension(self, cap: int) -> int:
        """Return what the system says of capability ``cap``, 0 for missing (4.4 KVM_CHECK_EXTENSION).

        Some capabilities depend on the type of VM: ask the ``Vm`` for those.

        Raises:
            BackendError: the ioctl failed.
        """
        try:
            return ioctl(self._fd.fileno(), KVM_CHECK_EXTENSION, cap, f"ask for {capability_name(cap)}")
        except OSError as error:
            raise BackendError(f"cannot {error.strerror}", error.errno or 0) from error

    def supported_cpuid(self) -> tuple[CpuidEntry, ...]:
        """Return the CPUID leaves that this host can give to a guest (4.46 KVM_GET_SUPPORTED_CPUID), read once.

        Raises:
            BackendError: the ioctl failed.
        """
        if not self._cpuid:
            self._cpuid = self._read_cpuid()
        return self._cpuid

    def _read_cpuid(self) -> tuple[CpuidEntry, ...]:
        capacity = _CPUID_CAPACITY
        while True:
            table = empty_table(capacity)
            if raw_ioctl(self._fd.fileno(), KVM_GET_SUPPORTED_CPUID, ctypes.addressof(table)) == 0:
                return read_table(table)
            errno = ctypes.get_errno()
            if errno != errno_codes.E2BIG or capacity >= _CPUID_CAPACITY_LIMIT:
                cause = OSError(errno, os.strerror(errno))
                raise BackendError(f"cannot ask for the supported CPUID: {cause.strerror}", errno) from cause
            capacity *= 2

    def physical_address_bits(self) -> int:
        """Return the width in bits of a guest-physical address here (MAXPHYADDR).

        Raises:
            BackendError: the CPUID cannot be read.
        """
        return physical_address_bits(self.supported_cpuid())

    def supports_gigabyte_pages(self) -> bool:
        """Tell whether a guest here may map memory by pages of 1 GiB.

        Raises:
            BackendError: the CPUID cannot be read.
        """
        return supports_gigabyte_pages(self.supported_cpuid())

    def create_vm(self, vm_type: int = KVM_X86_DEFAULT_VM) -> Vm:
        """Create a virtual machine of type KVM_X86_*_VM (4.2 KVM_CREATE_VM).

        Raises:
            HostError: the kernel has no memory or descriptors left for it.
            MissingCapability: this host does not offer that type.
        """
        name = VM_TYPE_NAMES.get(vm_type, f"type {vm_type}")
        while True:
            fd = raw_ioctl(self._fd.fileno(), KVM_CREATE_VM, vm_type)
            if fd >= 0:
                return Vm(fd, self._vcpu_mmap_size)
            errno = ctypes.get_errno()
            # Registering with the memory manager takes many locks and gives up for any signal; to try again
            # is all that one can do.
            if errno == errno_codes.EINTR:
                continue
            cause = OSError(errno, os.strerror(errno))
            if errno == errno_codes.EINVAL:
                raise MissingCapability(
                    "KVM_CAP_VM_TYPES", f"this host's KVM offers no VM of {name}: see 'kvmd check'"
                ) from cause
            raise HostError(
                f"cannot create a VM of {name}: {cause.strerror}; free memory, or raise the limit of open files"
            ) from cause

    def close(self) -> None:
        """Give up the device; harmless the second time. VMs live on without it."""
        self._fd.close()


def _remedy(path: str, error: OSError) -> str:
    """Return one line that says why ``path`` cannot be opened and how to mend that."""
    if error.errno in (errno_codes.ENOENT, errno_codes.ENOTDIR):
        return f"{path} does not exist: {_MODPROBE}; {_NESTED}; {_CONTAINER}"
    if error.errno in (errno_codes.ENODEV, errno_codes.ENXIO):
        return f"{path} has no driver behind it: {_MODPROBE}; {_NESTED}"
    if error.errno in (errno_codes.EACCES, errno_codes.EPERM):
        return f"{path} is forbidden to this user: {_permission_remedy(path)}; {_CONTAINER}"
    return f"{path} cannot be opened: {error.strerror}"


def _permission_remedy(path: str) -> str:
    try:
        node = os.stat(path)  # noqa: PTH116  the whole module deals in paths as the operator wrote them
    except OSError:
        return "make its directory searchable"
    try:
        group = grp.getgrgid(node.st_gid).gr_name
    except KeyError:
        group = str(node.st_gid)
    wanted = stat.S_IRGRP | stat.S_IWGRP
    # Nobody should join group root for this, and joining a group that cannot write would not help.
    if node.st_gid != 0 and node.st_mode & wanted == wanted:
        return f"join its group with 'usermod -aG {group} USER' and log in again"
    return (
        f"it belongs to group {group} with mode {stat.S_IMODE(node.st_mode):04o}: have root run "
        f"'chgrp kvm {path}' and 'chmod 660 {path}', then 'usermod -aG kvm USER' and log in again"
    )
