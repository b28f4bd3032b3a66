"""Emulated protection by attributes: two views of guest memory, the one that is not live marked private.

Both views have ordinary memslots, from the start of the machine to its end. A page that carries
KVM_MEMORY_ATTRIBUTE_PRIVATE in a slot without guest_memfd can be mapped by nobody: each access that the processor makes
ends in a memory fault (arch/x86/kvm/mmu/mmu.c, kvm_mmu_faultin_pfn_private). So a conversion is one ioctl a view: first
the one that dies is marked, then the other one's mark is taken away. No slot is ever away, and no vCPU has to leave
the guest.

What KVM emulates does not ask for attributes: a ``rep insb`` into the dead view stores there without an exit. So that
nothing of it shows up later, the side that becomes live is emptied before it does.
"""

from __future__ import annotations

from typing import Generic

from kvmd.conversion.changes import Failure, FailureKind
from kvmd.errors import BackendError, HostError
from kvmd.memory.backing import Backing
from kvmd.memory.page_state import PageStateMap
from kvmd.memory.range_set import RangeSet
from kvmd.protection.attributes import ATTRIBUTE_PRIVATE, SLOT_BYTES, parts, remove_slots, set_in_chunks, told
from kvmd.protection.base import Applied
from kvmd.protection.two_views import Tripwire, TwoViews
from kvmd.protection.vm import AttributeVm, F
from kvmd.ranges import GpaRange, PageState


class AttributeViews(TwoViews, Generic[F]):
    """The two views of one machine's memory, tripped by attributes.

    Args:
        vm: where memslots and attributes go.
        backings: host memory of each view, of the machine's whole size.
        c_bit: the position of the C-bit.
        state: the state of each page, which is the view that is live; only read here, under the memory lock.

    Raises:
        HostError: KVM refused a memslot or an attribute.
    """

    def __init__(
        self, vm: AttributeVm[F], backings: dict[PageState, Backing], *, c_bit: int, state: PageStateMap
    ) -> None:
        super().__init__(backings, c_bit=c_bit)
        self._vm = vm
        self._state = state
        self._slots: list[GpaRange] = []
        self._dead = RangeSet()
        try:
            self._set_up()
        except BackendError as error:
            self.close()
            raise HostError(f"cannot set up guest memory: {told(error)}: ask for less memory") from error

    def facts(self) -> dict[str, object]:
        """Return what the machine's first log line says of it."""
        return {
            "protection": "emulated",
            "tripwire": Tripwire.ATTRIBUTE.value,
            "c_bit": self._mask.bit_length() - 1,
            "memslots": len(self._slots),
        }

    def apply(self, range_: GpaRange, to: PageState) -> Applied:
        """Make the view ``to`` of all pages of the range live: all of them, or none."""
        dies = to.opposite
        # Pages that are in the state already keep what they hold.
        moving = tuple(self._state.runs(dies, range_))
        try:
            self._mark(range_, dies, ATTRIBUTE_PRIVATE)
        except BackendError as error:
            return Applied(range_.start, Failure(FailureKind.REFUSED, told(error)))
        try:
            kind = FailureKind.DISCARD_FIRST
            for run in moving:
                self._backings[to].empty(run)
            kind = FailureKind.REFUSED
            self._mark(range_, to, 0)
        except BackendError as error:
            return Applied(range_.start, Failure(kind, told(error) + self._revive(moving, dies)))
        if self._dead:
            self._dead.remove(range_)
        return Applied(range_.end)

    def diagnose(self, range_: GpaRange, state: PageState) -> str:
        """Return what may keep an access to live memory from succeeding."""
        if self._dead.within(range_):
            return f"neither view is live, since KVM refused to make the {state.value} one live again"
        return ""

    def close(self) -> None:
        """Remove the memslots together with the attributes of their pages; harmless the second time."""
        remove_slots(self._vm, self._slots)

    # -- slots and attributes ----------------------------------------------------------------------------------

    def _set_up(self) -> None:
        for view in PageState:
            # The marks first: where there is no slot yet, KVM has nothing to take away from a guest.
            for range_ in self._state.runs(view.opposite):
                set_in_chunks(self._vm, self._in_view(range_, view), ATTRIBUTE_PRIVATE)
            for part in parts(self._state.range, SLOT_BYTES):
                placed = self._in_view(part, view)
                address = self._backings[view].address_of(part.start)
                self._vm.set_memory_region(len(self._slots), placed.start, placed.size_bytes, address)
                self._slots.append(placed)

    def _in_view(self, range_: GpaRange, view: PageState) -> GpaRange:
        return GpaRange.of_size(self.view_gpa(range_.start, view), range_.size_bytes)

    def _mark(self, range_: GpaRange, view: PageState, attributes: int) -> None:
        self._vm.set_memory_attributes(self._in_view(range_, view), attributes)

    def _revive(self, runs: tuple[GpaRange, ...], view: PageState) -> str:
        """After a failure, make the view live again. Return what to add to the message where that fails too.

        Then neither view is live, which is safe. The pages count as what they were, and a conversion to the other
        state is tried as if nothing had been.
        """
        problem = ""
        for run in runs:
            try:
                self._mark(run, view, 0)
            except BackendError as error:
                self._dead.add(run)
                problem = f"; and neither view is live now: {told(error)}"
        return problem
