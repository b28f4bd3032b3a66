"""One virtual machine of KVM: memslots, memory attributes, capabilities, vCPUs."""

from __future__ import annotations

import ctypes
import errno as errno_codes
import os
import struct
from typing import NoReturn

from kvmd.closing import Closing
from kvmd.errors import BackendError, MissingCapability, SwapFailed
from kvmd.kvm.capability_table import capability_name
from kvmd.kvm.fault_layout import FaultLayout
from kvmd.kvm.fd import OwnedFd
from kvmd.kvm.guest_memfd import GuestMemfd
from kvmd.kvm.ioctl import ioctl, quick_ioctl, raw_ioctl
from kvmd.kvm.uapi import (
    KVM_CAP_USER_MEMORY2,
    KVM_CHECK_EXTENSION,
    KVM_CREATE_GUEST_MEMFD,
    KVM_CREATE_IRQCHIP,
    KVM_CREATE_PIT2,
    KVM_CREATE_VCPU,
    KVM_ENABLE_CAP,
    KVM_IOEVENTFD,
    KVM_IOEVENTFD_FLAG_DATAMATCH,
    KVM_IRQFD,
    KVM_MEM_GUEST_MEMFD,
    KVM_PIT_SPEAKER_DUMMY,
    KVM_SET_IDENTITY_MAP_ADDR,
    KVM_SET_MEMORY_ATTRIBUTES,
    KVM_SET_TSS_ADDR,
    KVM_SET_USER_MEMORY_REGION,
    KVM_SET_USER_MEMORY_REGION2,
    Address,
    CreateGuestMemfd,
    EnableCap,
    IoEventFd,
    IrqFd,
    MemoryAttributes,
    PitConfig,
    UserspaceMemoryRegion2,
)
from kvmd.kvm.vcpu import KvmVcpu
from kvmd.ranges import GpaRange

# UserspaceMemoryRegion2 up to its padding. One pack_into costs a fifth of seven stores to ctypes fields.
_REGION = struct.Struct("=IIQQQQI")
_SLOT = struct.Struct("=I")
_MEMFD = struct.Struct("=QQ")  # size, flags: CreateGuestMemfd
_SWAP_STEPS = (
    "delete memslot {dying}",
    "make memslot {dying} a tripwire",
    "delete memslot {rising}",
    "set memslot {rising}",
)
_SWAP_STRIDE = ctypes.sizeof(UserspaceMemoryRegion2)


class Vm(Closing):
    """A virtual machine (KVM_CREATE_VM), which lives until it and all of its vCPUs are closed.

    Changes of memslots and guest_memfds share one preallocated argument: they must be serialised by the
    caller, who has to hold a lock over a whole conversion anyway. Everything else is free of shared state.

    Args:
        fd: the VM's descriptor, owned from now on.
        vcpu_mmap_size: bytes that each vCPU shares with the kernel (KVM_GET_VCPU_MMAP_SIZE).
    """

    def __init__(self, fd: int, vcpu_mmap_size: int) -> None:
        self._fd = OwnedFd(fd, "virtual machine")
        self._vcpu_mmap_size = vcpu_mmap_size
        self._has_region2 = self.check_extension(KVM_CAP_USER_MEMORY2) > 0
        # The old structure is the head of the new one, so one buffer serves both ioctls.
        self._region = UserspaceMemoryRegion2()
        self._region_address = ctypes.addressof(self._region)
        self._region_request = KVM_SET_USER_MEMORY_REGION2 if self._has_region2 else KVM_SET_USER_MEMORY_REGION
        # Four of them in a row; but for the slot's number, the two that delete one stay all zeros.
        self._swap = tuple(bytearray(ctypes.sizeof(UserspaceMemoryRegion2)) for _ in _SWAP_STEPS)
        self._memfd = bytearray(ctypes.sizeof(CreateGuestMemfd))

    def check_extension(self, cap: int) -> int:
        """Return what this VM says of capability ``cap``: 0 where it lacks it (4.4 KVM_CHECK_EXTENSION).

        Raises:
            BackendError: the ioctl failed.
        """
        result = raw_ioctl(self._fd.fileno(), KVM_CHECK_EXTENSION, cap)
        if result < 0:
            _fail(f"ask the VM for {capability_name(cap)}")
        return result

    def enable_capability(self, cap: int, *args: int) -> None:
        """Enable capability ``cap`` with up to four arguments (4.37 KVM_ENABLE_CAP).

        Raises:
            BackendError: the VM lacks it, refuses the arguments, or is past the point where it can change.
        """
        argument = EnableCap(cap=cap)
        argument.args[: len(args)] = args
        if raw_ioctl(self._fd.fileno(), KVM_ENABLE_CAP, ctypes.addressof(argument)) < 0:
            _fail(f"enable {capability_name(cap)} with {args}")

    def set_memory_region(
        self,
        slot: int,
        gpa: int,
        size_bytes: int,
        userspace_addr: int,
        flags: int = 0,
        guest_memfd: GuestMemfd | None = None,
        guest_memfd_offset: int = 0,
    ) -> None:
        """Create, move or delete a memslot (4.140 KVM_SET_USER_MEMORY_REGION2). Serialised by the caller.

        Args:
            slot: number below KVM_CAP_NR_MEMSLOTS.
            gpa: start in guest-physical memory, C-bit included.
            size_bytes: length; 0 deletes the slot.
            userspace_addr: start in the memory of this process.
            flags: KVM_MEM_* bits; KVM_MEM_GUEST_MEMFD is added where ``guest_memfd`` is given.
            guest_memfd: private memory of the slot. KVM holds it by itself: it can be closed at once.
            guest_memfd_offset: where in it the slot begins, in bytes.

        Raises:
            BackendError: KVM refused, such as EEXIST for an overlap or EINVAL for a misalignment.
            MissingCapability: ``guest_memfd`` without KVM_CAP_USER_MEMORY2.
        """
        memfd = 0
        if guest_memfd is not None:
            if not self._has_region2:
                raise MissingCapability(
                    "KVM_CAP_USER_MEMORY2",
                    "a memslot with a guest_memfd needs KVM_CAP_USER_MEMORY2: use Linux 6.8 or later",
                )
            memfd = guest_memfd.fileno()
            flags |= KVM_MEM_GUEST_MEMFD
        _REGION.pack_into(self._region, 0, slot, flags, gpa, size_bytes, userspace_addr, guest_memfd_offset, memfd)
        if raw_ioctl(self._fd.fileno(), self._region_request, self._region_address):
            _fail(
                f"set memslot {slot} to [{gpa:#x}, {gpa + size_bytes:#x}) at {userspace_addr:#x} with flags {flags:#x}"
            )

    def delete_memory_region(self, slot: int) -> None:
        """Delete a memslot; its memory attributes stay. Serialised by the caller.

        Raises:
            BackendError: there is no such slot.
        """
        _REGION.pack_into(self._region, 0, slot, 0, 0, 0, 0, 0, 0)
        if raw_ioctl(self._fd.fileno(), self._region_request, self._region_address):
            _fail(f"delete memslot {slot}")

    def swap_views(
        self,
        dying: int,
        tripwire_gpa: int,
        inaccessible: int,
        memfd: GuestMemfd,
        rising: int,
        live_gpa: int,
        userspace_addr: int,
        size_bytes: int,
    ) -> None:
        """Make the other view of some pages live: see ``kvmd.protection.vm.SlotVm``. Serialised by the caller.

        KVM puts the thread to sleep in each of these calls, and Python is slow after a sleep, when the processor's
        caches and branch predictors know other programs: so the arguments are ready before the first one.

        Raises:
            SwapFailed: KVM refused a step.
        """
        first, second, third, fourth = self._swap
        _SLOT.pack_into(first, 0, dying)
        _REGION.pack_into(
            second, 0, dying, KVM_MEM_GUEST_MEMFD, tripwire_gpa, size_bytes, inaccessible, 0, memfd.number
        )
        _SLOT.pack_into(third, 0, rising)
        _REGION.pack_into(fourth, 0, rising, 0, live_gpa, size_bytes, userspace_addr, 0, 0)
        fd, request, made = self._fd.number, self._region_request, 0
        try:
            quick_ioctl(fd, request, first)
            made = 1
            quick_ioctl(fd, request, second)
            made = 2
            memfd.close()
            quick_ioctl(fd, request, third)
            made = 3
            quick_ioctl(fd, request, fourth)
        except OSError as error:
            memfd.close()
            operation = _SWAP_STEPS[made].format(dying=dying, rising=rising)
            raise SwapFailed(f"cannot {operation}: {error.strerror}", error.errno or 0, made) from error

    def create_guest_memfd(self, size_bytes: int, flags: int = 0) -> GuestMemfd:
        """Create a guest_memfd of this VM (4.142 KVM_CREATE_GUEST_MEMFD). Serialised by the caller.

        Args:
            size_bytes: length, page-aligned.
            flags: GUEST_MEMFD_FLAG_* bits, out of what KVM_CAP_GUEST_MEMFD_FLAGS reports.

        Raises:
            BackendError: KVM refused, such as EINVAL for flags or EMFILE.
            MissingCapability: the kernel has no guest_memfd.
        """
        _MEMFD.pack_into(self._memfd, 0, size_bytes, flags)
        try:
            fd = quick_ioctl(self._fd.number, KVM_CREATE_GUEST_MEMFD, self._memfd)
        except OSError as error:
            operation = f"create a guest_memfd of {size_bytes:#x} bytes with flags {flags:#x}"
            _fail(operation, "KVM_CAP_GUEST_MEMFD", error)
        # Unlike every other descriptor of KVM this one is born inheritable; a tripwire is armed only once its
        # last descriptor is closed, so a program started meanwhile would keep it unarmed.
        os.set_inheritable(fd, False)  # noqa: FBT003  positional-only
        return GuestMemfd(fd, size_bytes)

    def set_memory_attributes(self, gpa_range: GpaRange, attributes: int) -> None:
        """Set the attributes of every page of a range (4.141 KVM_SET_MEMORY_ATTRIBUTES).

        KVM never looks at memslots here, and its cost is linear in pages under a lock of the whole VM: the
        caller has checked that memory covers the range, and passes it in bounded pieces.

        Raises:
            BackendError: KVM refused, such as EINVAL for an attribute that this type of VM lacks.
            MissingCapability: the kernel has no memory attributes.
        """
        argument = MemoryAttributes(gpa_range.start, gpa_range.size_bytes, attributes, 0)
        if raw_ioctl(self._fd.fileno(), KVM_SET_MEMORY_ATTRIBUTES, ctypes.addressof(argument)):
            _fail(f"set attributes {attributes:#x} on {gpa_range}", "KVM_CAP_MEMORY_ATTRIBUTES")

    def create_interrupt_controllers(self, *, tss_gpa: int, identity_map_gpa: int) -> None:
        """Give the VM the PC's interrupt controllers and timer, inside the kernel. Before any vCPU.

        These are two PICs, an IOAPIC of 24 pins, a local APIC for each vCPU (4.24 KVM_CREATE_IRQCHIP) and a PIT (4.71
        KVM_CREATE_PIT2). GSI n is pin n of the IOAPIC, and below 16 the PICs' line too. From now on HLT does not leave
        the guest, and all vCPUs but the first wait for the guest to start them.

        Args:
            tss_gpa: three pages outside memory that Intel's processors need for real mode (4.35 KVM_SET_TSS_ADDR).
            identity_map_gpa: a page likewise (4.36 KVM_SET_IDENTITY_MAP_ADDR).

        Raises:
            BackendError: KVM refused.
        """
        fd = self._fd.fileno()
        address = Address(identity_map_gpa)
        if raw_ioctl(fd, KVM_SET_IDENTITY_MAP_ADDR, ctypes.addressof(address)):
            _fail(f"set the identity map's address to {identity_map_gpa:#x}")
        if raw_ioctl(fd, KVM_SET_TSS_ADDR, tss_gpa):
            _fail(f"set the address of the TSS to {tss_gpa:#x}")
        if raw_ioctl(fd, KVM_CREATE_IRQCHIP, 0):
            _fail("create the interrupt controllers")
        # Port 0x61 comes with it: without that, a kernel that calibrates its clock by the PIT waits for ever.
        pit = PitConfig(flags=KVM_PIT_SPEAKER_DUMMY)
        if raw_ioctl(fd, KVM_CREATE_PIT2, ctypes.addressof(pit)):
            _fail("create the PIT")

    def connect_interrupt(self, eventfd: int, gsi: int) -> None:
        """Raise interrupt line ``gsi`` once, as an edge, whenever ``eventfd`` is written (4.75 KVM_IRQFD).

        It lasts until the eventfd's last descriptor is closed, or the VM is gone.

        Raises:
            BackendError: KVM refused, such as EBUSY for an eventfd that is connected already.
        """
        argument = IrqFd(fd=eventfd, gsi=gsi)
        if raw_ioctl(self._fd.fileno(), KVM_IRQFD, ctypes.addressof(argument)):
            _fail(f"connect an eventfd to interrupt line {gsi}")

    def connect_notification(self, eventfd: int, gpa: int, value: int) -> None:
        """Write ``eventfd`` whenever the guest stores ``value`` in 32 bits at ``gpa`` (4.59 KVM_IOEVENTFD).

        The vCPU does not leave KVM_RUN for it. It lasts until the VM is gone, which keeps the eventfd alive.

        Raises:
            BackendError: KVM refused, such as EEXIST for an address and value that are connected already.
        """
        argument = IoEventFd(datamatch=value, addr=gpa, len=4, fd=eventfd, flags=KVM_IOEVENTFD_FLAG_DATAMATCH)
        if raw_ioctl(self._fd.fileno(), KVM_IOEVENTFD, ctypes.addressof(argument)):
            _fail(f"connect an eventfd to a store of {value} at {gpa:#x}")

    def create_vcpu(self, index: int, layout: FaultLayout) -> KvmVcpu:
        """Create vCPU number ``index`` (4.7 KVM_CREATE_VCPU), whose memory faults come as ``layout`` says.

        Raises:
            BackendError: KVM refused, such as EEXIST for a number in use or EINVAL for one too large.
        """
        try:
            fd = ioctl(self._fd.fileno(), KVM_CREATE_VCPU, index, f"create vCPU {index}")
        except OSError as error:
            raise BackendError(f"cannot {error.strerror}", error.errno or 0) from error
        return KvmVcpu(fd, index, self._vcpu_mmap_size, layout)

    def close(self) -> None:
        """Give up the VM; harmless the second time. Its memory goes when its last vCPU is closed too."""
        self._fd.close()


def _fail(operation: str, capability: str | None = None, cause: OSError | None = None) -> NoReturn:
    """Raise for the ioctl that failed.

    Args:
        operation: what could not be done, after 'cannot'.
        capability: what the kernel lacks when it does not know the ioctl at all.
        cause: the error; by default the errno of the ``raw_ioctl`` just made.
    """
    errno = ctypes.get_errno() if cause is None else cause.errno or 0
    cause = cause or OSError(errno, os.strerror(errno))
    if errno == errno_codes.ENOTTY and capability is not None:
        raise MissingCapability(
            capability, f"cannot {operation}: this kernel lacks {capability}, use Linux 6.8 or later"
        ) from cause
    raise BackendError(f"cannot {operation}: {cause.strerror}", errno) from cause
