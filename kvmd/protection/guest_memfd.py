"""Private memory as KVM itself has it: a guest_memfd beside shared memory, and an attribute that says which is meant.

Each memslot of memory that converts has both: a guest_memfd, whose pages no process can map, for its private pages, and
the shared backing for the others. KVM_MEMORY_ATTRIBUTE_PRIVATE chooses, page by page (kvm-api, 4.141
KVM_SET_MEMORY_ATTRIBUTES). There is one view: a guest's address says nothing about the state, so the guest asks.

On KVM_X86_SW_PROTECTED_VM a guest sees whatever the attribute says and never faults for a conversion; SNP and TDX do,
and their exit's flags say what they want. The code is the same for all of them.

What KVM emulates (``rep insb``) does not ask for attributes and lands in the shared backing. So that side is emptied
before it becomes live, too.
"""

from __future__ import annotations

import threading
from typing import Generic

from kvmd.conversion.changes import Failure, FailureKind
from kvmd.conversion.messages import MmioAccess
from kvmd.errors import BackendError, HostError
from kvmd.hv.exits import MemoryFault
from kvmd.memory.backing import Backing
from kvmd.memory.page_state import PageStateMap
from kvmd.protection.attributes import ATTRIBUTE_PRIVATE, SLOT_BYTES, parts, remove_slots, set_in_chunks, told
from kvmd.protection.base import Applied
from kvmd.protection.vm import AttributeVm, M
from kvmd.ranges import PRIVATE, SHARED, GpaRange, PageState


class GuestMemfdProtection(Generic[M]):
    """Private and shared memory of one machine.

    Args:
        vm: where memslots and attributes go.
        shared: host memory of the shared pages, of the machine's whole size.
        pinned: memory that is shared for good, from 0: it has no guest_memfd.
        state: the state of each page; only read here, and only under ``lock``.
        lock: the memory lock. ``apply`` and ``discard`` are called by whoever holds it.

    Raises:
        HostError: KVM refused a memslot, the guest_memfd or an attribute.
    """

    def __init__(
        self, vm: AttributeVm[M], shared: Backing, *, pinned: GpaRange, state: PageStateMap, lock: threading.Lock
    ) -> None:
        self._vm = vm
        self._shared = shared
        self._pinned = pinned
        self._state = state
        self._lock = lock
        self._size = shared.size_bytes
        self._slots: list[GpaRange] = []
        self._memfd: M | None = None
        try:
            self._set_up()
        except BackendError as error:
            self.close()
            raise HostError(f"cannot set up private memory: {told(error)}: ask for less memory") from error

    def facts(self) -> dict[str, object]:
        """Return what the machine's first log line says of it."""
        return {"protection": "guest-memfd", "vm_type": "KVM_X86_SW_PROTECTED_VM", "memslots": len(self._slots)}

    def locate(self, gpa: int) -> tuple[int, PageState | None]:
        """Return the gpa as it is and the state that its page is in; None outside memory.

        An address does not tell what the guest wants, and an access that KVM emulates, or cannot, is no wish to
        convert: it is what it is in the present state.
        """
        if gpa >= self._size:
            return gpa, None
        with self._lock:
            return gpa, self._state.segment_at(gpa).state

    def wanted(self, fault: MemoryFault) -> tuple[int, PageState]:
        """Return what the fault's own flags say."""
        return fault.gpa, PRIVATE if fault.private else SHARED

    def apply(self, range_: GpaRange, to: PageState) -> Applied:
        """Make the pages of the range private or shared: all of them, or none."""
        kind = FailureKind.DISCARD_FIRST
        try:
            if to is SHARED:
                # Pages that are shared already keep what they hold.
                for run in self._state.runs(PRIVATE, range_):
                    self._shared.empty(run)
            kind = FailureKind.REFUSED
            self._vm.set_memory_attributes(range_, ATTRIBUTE_PRIVATE if to is PRIVATE else 0)
        except BackendError as error:
            return Applied(range_.start, Failure(kind, told(error)))
        return Applied(range_.end)

    def discard(self, range_: GpaRange, side: PageState) -> None:
        """Give the memory behind one side of the range back to the host. Raises BackendError."""
        if side is SHARED:
            self._shared.discard(range_)
        elif self._memfd is not None:
            self._memfd.punch_hole(range_.start, range_.size_bytes)

    def asks_by_address(self) -> bool:
        """Tell that an access is no wish to convert."""
        return False

    def access(self, state: PageState, access: MmioAccess) -> bytes:  # noqa: ARG002 - only shared memory has a host side
        """Make a guest's own access to shared memory."""
        if access.data is None:
            return self._shared.read(access.gpa, access.size)
        self._shared.write(access.gpa, access.data)
        return b""

    def access_in_place(self, access: MmioAccess) -> bytes | None:
        """Make a guest's own access where the page is shared; None where it is private, perhaps only just.

        Under the memory lock: another vCPU's conversion comes wholly before it, or wholly after.
        """
        with self._lock:
            state = self._state.segment_at(access.gpa).state
            return self.access(state, access) if state is SHARED else None

    def diagnose(self, range_: GpaRange, state: PageState) -> str:
        """Return what may keep an access to memory from succeeding although it is in the right state."""
        if not any(slot.overlaps(range_) for slot in self._slots):
            return "its memslot is gone"
        if state is SHARED:
            return "the host memory behind it cannot be had, or KVM has another attribute for it than kvmd set"
        if range_.start < self._pinned.end:
            return "its memslot has no guest_memfd"
        return (
            "its guest_memfd has no page for it, or KVM would have to emulate the access, which private memory forbids"
        )

    def close(self) -> None:
        """Remove the memslots together with the attributes of their pages; harmless the second time."""
        remove_slots(self._vm, self._slots)
        if self._memfd is not None:
            self._memfd.close()
            self._memfd = None

    def _set_up(self) -> None:
        # The attributes first: where there is no slot yet, KVM has nothing to take away from a guest.
        for range_ in self._state.runs(PRIVATE):
            set_in_chunks(self._vm, range_, ATTRIBUTE_PRIVATE)
        self._add_slot(self._pinned, None)
        if self._pinned.end == self._size:
            return
        # As long as all memory, so that an offset in it is a gpa; it holds nothing where nothing is private.
        self._memfd = self._vm.create_guest_memfd(self._size)
        for part in parts(GpaRange(self._pinned.end, self._size), SLOT_BYTES):
            self._add_slot(part, self._memfd)

    def _add_slot(self, range_: GpaRange, memfd: M | None) -> None:
        # No flags: KVM takes neither dirty logging nor read-only memory beside a guest_memfd.
        self._vm.set_memory_region(
            len(self._slots),
            range_.start,
            range_.size_bytes,
            self._shared.address_of(range_.start),
            guest_memfd=memfd,
            guest_memfd_offset=0 if memfd is None else range_.start,
        )
        self._slots.append(range_)
