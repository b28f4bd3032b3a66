"""A VM without KVM: memslots, guest_memfds and attributes as KVM's own rules have them, and failures on demand.

The rules are those of virt/kvm/kvm_main.c (kvm_set_memory_region, kvm_vm_set_mem_attributes), virt/kvm/guest_memfd.c
(kvm_gmem_create, kvm_gmem_bind) and arch/x86/kvm/mmu/mmu.c (kvm_mmu_faultin_pfn) of Linux 6.18.
tests/protection/test_vm_contract.py holds this class and the real one to the same tests.
"""

from __future__ import annotations

import errno as errno_codes
import os
from bisect import bisect_left, bisect_right, insort
from dataclasses import dataclass
from typing import NoReturn

from kvmd.errors import BackendError, SwapFailed
from kvmd.memory.range_set import RangeSet
from kvmd.ranges import GpaRange
from kvmd.units import PAGE_MASK, PAGE_SIZE

MOST_PAGES = (1 << 31) - 1
"""KVM_MEM_MAX_NR_PAGES: the longest memslot."""

LOG_DIRTY_PAGES, READONLY, GUEST_MEMFD = 1, 2, 4
"""KVM_MEM_* flags."""

KNOWN_MEMFD_FLAGS = 3
"""GUEST_MEMFD_FLAG_MMAP and GUEST_MEMFD_FLAG_INIT_SHARED."""


ATTRIBUTE_PRIVATE = 8
"""KVM_MEMORY_ATTRIBUTE_PRIVATE."""


class FakeMemfd:
    """A guest_memfd: what a slot bound to it does depends on whether it is still open.

    Attributes:
        pages: what the guest stored, by offset; a page that is not here reads as zeros.
    """

    def __init__(self, vm: FakeVm, size: int, flags: int) -> None:
        self.size = size
        self.flags = flags
        self.closed = False
        self.bound: list[tuple[int, int]] = []
        self.pages: dict[int, int] = {}
        self._vm = vm

    def close(self) -> None:
        self.closed = True

    def punch_hole(self, offset: int, size: int) -> None:
        operation = f"punch a hole of {size:#x} bytes at {offset:#x}"
        if self.closed:
            raise ValueError("guest_memfd is used after it was closed")
        self._vm._enter(operation)
        if size <= 0 or (offset | size) & PAGE_MASK:
            _refuse(operation, errno_codes.EINVAL)
        for page in [page for page in self.pages if offset <= page < offset + size]:
            del self.pages[page]


@dataclass(frozen=True, slots=True)
class FakeSlot:
    """One memslot: ``[gpa, end)``, and what stands behind it."""

    number: int
    gpa: int
    size_bytes: int
    userspace_addr: int
    flags: int
    memfd: FakeMemfd | None
    memfd_offset: int

    @property
    def end(self) -> int:
        return self.gpa + self.size_bytes

    @property
    def is_tripwire(self) -> bool:
        """KVM keeps no reference to the file: once its last descriptor is closed, there is no memory.

        Only a memfd that can be mapped (GUEST_MEMFD_FLAG_MMAP) serves shared accesses too.
        """
        return self.memfd is not None and self.memfd.closed and self.memfd.flags & 1 == 1


class FakeVm:
    """What protections ask of a VM.

    Args:
        slot_count: memslots, numbered from 0 (KVM_CAP_NR_MEMSLOTS).
        gpa_bits: width of a guest-physical address.
        software_protected: the VM is a KVM_X86_SW_PROTECTED_VM, whose pages may carry the attribute PRIVATE.

    Attributes:
        private: the pages that carry it.
        attribute_calls: how often attributes were set, successfully or not.
    """

    def __init__(self, slot_count: int = 512, gpa_bits: int = 48, *, software_protected: bool = False) -> None:
        self.private = RangeSet()
        self.attribute_calls = 0
        self._software_protected = software_protected
        self.slots: dict[int, FakeSlot] = {}
        self.calls = 0
        self.memfds: list[FakeMemfd] = []
        self._slot_count = slot_count
        self._gpa_limit = 1 << gpa_bits
        self._by_gpa: list[tuple[int, int]] = []
        self._found_holes: set[int] = set()
        self._failing = range(0)
        self._errno = 0

    # -- what the protection uses ---------------------------------------------------------------------------

    def set_memory_region(
        self,
        slot: int,
        gpa: int,
        size_bytes: int,
        userspace_addr: int,
        flags: int = 0,
        guest_memfd: FakeMemfd | None = None,
        guest_memfd_offset: int = 0,
    ) -> None:
        if guest_memfd is not None:
            if guest_memfd.closed:
                # As OwnedFd.fileno: no call is made at all.
                raise ValueError("guest_memfd is used after it was closed")
            flags |= GUEST_MEMFD
        operation = f"set memslot {slot} to [{gpa:#x}, {gpa + size_bytes:#x})"
        self._enter(operation)
        self._check_arguments(operation, slot, gpa, size_bytes, userspace_addr, flags, guest_memfd_offset)
        old = self.slots.get(slot)
        if size_bytes == 0:
            self._remove(operation, slot)
            return
        new = FakeSlot(slot, gpa, size_bytes, userspace_addr, flags, guest_memfd, guest_memfd_offset)
        # A slot bound to a guest_memfd is immutable, and of any other only the place and the flags may change.
        if old is not None and (
            flags & GUEST_MEMFD
            or userspace_addr != old.userspace_addr
            or size_bytes != old.size_bytes
            or (flags ^ old.flags) & (READONLY | GUEST_MEMFD)
        ):
            _refuse(operation, errno_codes.EINVAL)
        if any(other.gpa < new.end and gpa < other.end for other in self._around(new) if other.number != slot):
            _refuse(operation, errno_codes.EEXIST)
        if guest_memfd is not None:
            self._bind(operation, guest_memfd, guest_memfd_offset, size_bytes)
        if new.end > self._gpa_limit:
            _refuse(operation, errno_codes.EINVAL)
        if old is not None:
            self._remove(operation, slot)
        self.slots[slot] = new
        self._found_holes.clear()  # KVM's are of one generation of memslots (check_mmio_spte)
        insort(self._by_gpa, (gpa, slot))

    def swap_views(
        self,
        dying: int,
        tripwire_gpa: int,
        inaccessible: int,
        memfd: FakeMemfd,
        rising: int,
        live_gpa: int,
        userspace_addr: int,
        size_bytes: int,
    ) -> None:
        made = 0
        try:
            self.delete_memory_region(dying)
            made = 1
            self.set_memory_region(dying, tripwire_gpa, size_bytes, inaccessible, guest_memfd=memfd)
            made = 2
            memfd.close()
            self.delete_memory_region(rising)
            made = 3
            self.set_memory_region(rising, live_gpa, size_bytes, userspace_addr)
        except BackendError as error:
            raise SwapFailed(str(error), error.errno, made) from error
        finally:
            memfd.close()

    def delete_memory_region(self, slot: int) -> None:
        operation = f"delete memslot {slot}"
        self._enter(operation)
        self._check_arguments(operation, slot, 0, 0, 0, 0, 0)
        self._remove(operation, slot)

    def create_guest_memfd(self, size_bytes: int, flags: int = 0) -> FakeMemfd:
        operation = f"create a guest_memfd of {size_bytes:#x} bytes"
        self._enter(operation)
        if flags & ~KNOWN_MEMFD_FLAGS or size_bytes <= 0 or size_bytes & PAGE_MASK:
            _refuse(operation, errno_codes.EINVAL)
        memfd = FakeMemfd(self, size_bytes, flags)
        self.memfds.append(memfd)
        return memfd

    def set_memory_attributes(self, gpa_range: GpaRange, attributes: int) -> None:
        operation = f"set attributes {attributes:#x} on {gpa_range}"
        self.attribute_calls += 1
        self._enter(operation)
        if not self._software_protected or attributes & ~ATTRIBUTE_PRIVATE:
            _refuse(operation, errno_codes.EINVAL)
        # It never looks at memslots: holes and memory that is not there have attributes too.
        (self.private.add if attributes else self.private.remove)(gpa_range)

    # -- what the tests use ---------------------------------------------------------------------------------

    def access(self, gpa: int) -> str:
        """Tell what a guest finds at ``gpa``: ``live`` or ``private`` memory, a ``tripwire``, or a ``hole``."""
        slot = self.slot_at(gpa)
        page = gpa & ~PAGE_MASK
        if page in self._found_holes:
            return "hole"
        if self.private.within(GpaRange.of_size(page, PAGE_SIZE)):
            return "private" if slot is not None and slot.memfd is not None and not slot.memfd.closed else "tripwire"
        if slot is None:
            self._found_holes.add(page)
            return "hole"
        return "tripwire" if slot.is_tripwire else "live"

    def slot_at(self, gpa: int) -> FakeSlot | None:
        """Return the slot that holds ``gpa``."""
        index = bisect_right(self._by_gpa, (gpa, self._slot_count)) - 1
        if index < 0:
            return None
        slot = self.slots[self._by_gpa[index][1]]
        return slot if gpa < slot.end else None

    def fail_next(self, nth: int, errno: int, *, times: int = 1) -> None:
        """Make the ``nth`` call from now fail, and ``times - 1`` after it; a call that fails changes nothing."""
        self._failing = range(self.calls + nth, self.calls + nth + times)
        self._errno = errno

    # -- KVM's rules ----------------------------------------------------------------------------------------

    def _enter(self, operation: str) -> None:
        self.calls += 1
        if self.calls in self._failing:
            _refuse(operation, self._errno)

    def _check_arguments(
        self, operation: str, slot: int, gpa: int, size: int, userspace_addr: int, flags: int, memfd_offset: int
    ) -> None:
        known = GUEST_MEMFD if flags & GUEST_MEMFD else LOG_DIRTY_PAGES | READONLY
        if (
            flags & ~known
            or (size | gpa | userspace_addr | memfd_offset) & PAGE_MASK
            or not 0 <= slot < self._slot_count
            or gpa + size > 1 << 64
            or size // PAGE_SIZE > MOST_PAGES
        ):
            _refuse(operation, errno_codes.EINVAL)

    def _around(self, slot: FakeSlot) -> list[FakeSlot]:
        """Return all slots that could overlap ``slot``: those that start in it, and the one before."""
        first = max(bisect_left(self._by_gpa, (slot.gpa, 0)) - 1, 0)
        past = bisect_left(self._by_gpa, (slot.end, 0))
        return [self.slots[number] for _, number in self._by_gpa[first:past]]

    @staticmethod
    def _bind(operation: str, memfd: FakeMemfd, offset: int, size: int) -> None:
        if offset + size > memfd.size or any(offset < end and start < offset + size for start, end in memfd.bound):
            _refuse(operation, errno_codes.EINVAL)
        memfd.bound.append((offset, offset + size))

    def _remove(self, operation: str, number: int) -> None:
        slot = self.slots.pop(number, None)
        if slot is None:
            _refuse(operation, errno_codes.EINVAL)
        self._by_gpa.remove((slot.gpa, number))
        self._found_holes.clear()
        if slot.memfd is not None:
            slot.memfd.bound.remove((slot.memfd_offset, slot.memfd_offset + slot.size_bytes))


def _refuse(operation: str, errno: int) -> NoReturn:
    raise BackendError(f"cannot {operation}: {os.strerror(errno)}", errno) from OSError(errno, os.strerror(errno))
