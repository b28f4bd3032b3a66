"""What the conversion service needs of a machine's protection, whatever stands behind it."""

from __future__ import annotations

from typing import Protocol

import msgspec

from kvmd.conversion.changes import Failure
from kvmd.conversion.messages import MmioAccess
from kvmd.hv.exits import MemoryFault
from kvmd.ranges import GpaRange, PageState


class Applied(msgspec.Struct, frozen=True):
    """How far a change came.

    Attributes:
        end: the pages of the range below it are in the new state, the others in the old one.
        failure: why it did not come to the end, or None.
    """

    end: int
    failure: Failure | None = None


class Protection(Protocol):
    """Makes changes real. Called by one thread at a time: the conversion service serialises."""

    def locate(self, gpa: int) -> tuple[int, PageState | None]:
        """Split a gpa as the accelerator reports it into the plain gpa and the view it belongs to.

        The view is None where it is not guest memory.
        """

    def wanted(self, fault: MemoryFault) -> tuple[int, PageState]:
        """Return the plain gpa of a memory fault, and the state that the access needs."""

    def apply(self, range_: GpaRange, to: PageState) -> Applied:
        """Make all pages of the range live in the state ``to``, in order of address. Never raises."""

    def discard(self, range_: GpaRange, side: PageState) -> None:
        """Give the memory behind one side of the range back to the host.

        Raises:
            BackendError: the host refused; nothing else changed.
        """

    def asks_by_address(self) -> bool:
        """Tell whether an address names a view, so that an access asks for the page to be in that state.

        Only then is an access that KVM leaves to kvmd a request, and made by ``access`` once the page is converted.
        """

    def access(self, state: PageState, access: MmioAccess) -> bytes:
        """Make a guest's own access, on the live side, and return what a load read."""

    def access_in_place(self, access: MmioAccess) -> bytes | None:
        """Make a guest's own access where an address names no view, in the state that the page is in.

        Converts nothing. Returns what a load read, or None where only the guest itself could make it. From any
        thread that does not hold the memory lock.
        """

    def diagnose(self, range_: GpaRange, state: PageState) -> str:
        """Return what may keep an access to memory from succeeding that is in the state it needs; may be empty.

        For a message, after the same fault came back again and again. From any thread.
        """

    def facts(self) -> dict[str, object]:
        """Return what the machine's first log line says of it."""
