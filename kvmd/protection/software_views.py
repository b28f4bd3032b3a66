"""Emulated protection on the software CPU: two views of guest memory, of which each vCPU asks which one is live.

The emulator asks for every page that it does not know, and is told only of the live view: an access to the other ends
in a memory fault. So there are no memslots, nothing to cut, and a conversion costs the same whatever its size.
"""

from __future__ import annotations

from typing import Protocol

from kvmd.conversion.changes import Failure, FailureKind
from kvmd.errors import BackendError
from kvmd.memory.backing import Backing
from kvmd.protection.base import Applied
from kvmd.protection.two_views import TwoViews
from kvmd.ranges import GpaRange, PageState


class LiveVm(Protocol):
    """A VM that is told which view of a page is live."""

    def make_live(self, range_: GpaRange, view: PageState) -> None:
        """Make one view of all pages live, and the other not, with no vCPU in the guest. Raises BackendError."""


class SoftwareViews(TwoViews):
    """The two views of one machine's memory.

    Args:
        vm: where they are live.
        backings: host memory of each view, of the machine's whole size.
        c_bit: the position of the C-bit.
    """

    def __init__(self, vm: LiveVm, backings: dict[PageState, Backing], *, c_bit: int) -> None:
        super().__init__(backings, c_bit=c_bit)
        self._vm = vm

    def facts(self) -> dict[str, object]:
        """Return what the machine's first log line says of it."""
        return {"protection": "emulated", "c_bit": self._mask.bit_length() - 1}

    def apply(self, range_: GpaRange, to: PageState) -> Applied:
        """Make the view ``to`` of all pages of the range live: all of them, or none."""
        try:
            self._vm.make_live(range_, to)
        except BackendError as error:
            return Applied(range_.start, Failure(FailureKind.REFUSED, str(error)))
        return Applied(range_.end)

    def diagnose(self, range_: GpaRange, state: PageState) -> str:  # noqa: ARG002 - the protocol has them
        """Return nothing: what is live can be accessed."""
        return ""
