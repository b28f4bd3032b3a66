"""Two views of guest memory by one address bit: what every kind of emulated protection has in common.

The C-bit of a guest-physical address chooses the view (set = private, as on SEV), and each view has a backing of its
own. What tells the kinds apart is how the view of a page that is not live is made to trip.
"""

from __future__ import annotations

import enum

from kvmd.conversion.messages import MmioAccess
from kvmd.hv.exits import MemoryFault
from kvmd.memory.backing import Backing
from kvmd.ranges import PRIVATE, SHARED, GpaRange, PageState


class Tripwire(enum.Enum):
    """What stands in the view that is not live."""

    ATTRIBUTE = "attribute"
    """An ordinary slot whose pages carry KVM_MEMORY_ATTRIBUTE_PRIVATE: an access that the processor makes is a memory
    fault. One that KVM emulates is not seen, and what it stores is lost."""
    GUEST_MEMFD = "guest_memfd"
    """A slot bound to a guest_memfd that was closed: any access is a memory fault."""
    HOLE = "hole"
    """No slot: a data access is an MMIO exit, which kvmd completes; instructions cannot be fetched."""


class TwoViews:
    """Addresses and contents of the two views of one machine's memory.

    Args:
        backings: host memory of each view, of the machine's whole size.
        c_bit: the position of the C-bit.
    """

    def __init__(self, backings: dict[PageState, Backing], *, c_bit: int) -> None:
        self._backings = backings
        self._size = backings[PRIVATE].size_bytes
        self._mask = 1 << c_bit

    def view_gpa(self, gpa: int, view: PageState) -> int:
        """Return what the guest calls the plain ``gpa`` in a view."""
        return gpa | self._mask if view is PRIVATE else gpa

    def locate(self, gpa: int) -> tuple[int, PageState | None]:
        """Split a reported gpa into the plain one and its view, which is None outside memory."""
        plain = gpa & ~self._mask
        if plain >= self._size:
            return plain, None
        return plain, PRIVATE if gpa & self._mask else SHARED

    def wanted(self, fault: MemoryFault) -> tuple[int, PageState]:
        """Return the plain gpa and the state it needs: here the C-bit says so, the exit's flags do not."""
        return (
            fault.gpa & ~self._mask,
            PRIVATE if fault.gpa & self._mask else SHARED,
        )

    def discard(self, range_: GpaRange, side: PageState) -> None:
        """Give the memory behind one side of the range back to the host. Raises BackendError."""
        self._backings[side].discard(range_)

    def asks_by_address(self) -> bool:
        """Tell that an access asks for the view that its address names."""
        return True

    def access(self, state: PageState, access: MmioAccess) -> bytes:
        """Make a guest's own access on the live side."""
        backing = self._backings[state]
        if access.data is None:
            return backing.read(access.gpa, access.size)
        backing.write(access.gpa, access.data)
        return b""

    def access_in_place(self, access: MmioAccess) -> bytes | None:  # noqa: ARG002 - the protocol has it
        """Make none: without its view, an access says too little."""
        return None
