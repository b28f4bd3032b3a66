"""No protection: one view of memory, all of it shared, and nothing converts."""

from __future__ import annotations

from kvmd.conversion.changes import Failure, FailureKind
from kvmd.conversion.messages import MmioAccess
from kvmd.hv.exits import MemoryFault
from kvmd.protection.base import Applied
from kvmd.ranges import GpaRange, PageState


class NoProtection:
    """Memory of a machine without conversions.

    All of it is pinned, so the rules refuse every request before it gets here.

    Args:
        size_bytes: the memory's size in bytes.
    """

    def __init__(self, size_bytes: int) -> None:
        self._size = size_bytes

    def locate(self, gpa: int) -> tuple[int, PageState | None]:
        """Return the gpa as it is, in the only view; None outside memory."""
        return gpa, PageState.SHARED if gpa < self._size else None

    def wanted(self, fault: MemoryFault) -> tuple[int, PageState]:
        """Return what the fault's own flags say."""
        return fault.gpa, PageState.PRIVATE if fault.private else PageState.SHARED

    def apply(self, range_: GpaRange, to: PageState) -> Applied:
        """Refuse: there is no other view."""
        return Applied(
            range_.start,
            Failure(FailureKind.REFUSED, f"a machine without protection cannot convert {range_} to {to.value}"),
        )

    def discard(self, range_: GpaRange, side: PageState) -> None:
        """Do nothing: no side is ever left behind."""

    def asks_by_address(self) -> bool:
        """Tell that there is nothing to ask for."""
        return False

    def access(self, state: PageState, access: MmioAccess) -> bytes:  # noqa: ARG002 - the protocol has it
        """Answer like an address that nothing backs; KVM does not ask for memory that a memslot backs."""
        return b"" if access.data is not None else b"\xff" * access.size

    def access_in_place(self, access: MmioAccess) -> bytes:
        """Answer likewise."""
        return self.access(PageState.SHARED, access)

    def diagnose(self, range_: GpaRange, state: PageState) -> str:  # noqa: ARG002 - the protocol has them
        """Return nothing: there is nothing to be said."""
        return ""

    def facts(self) -> dict[str, object]:
        """Return what the machine's first log line says of it."""
        return {"protection": "none"}

    def close(self) -> None:
        """Do nothing: there is nothing to give up."""
