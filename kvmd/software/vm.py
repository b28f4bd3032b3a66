"""A virtual machine of the software CPU: memory in views, and vCPUs that take turns."""

from __future__ import annotations

from kvmd.ranges import GpaRange, PageState
from kvmd.software.memory import GuestMemory
from kvmd.software.turns import Turns
from kvmd.software.vcpu import SoftwareVcpu


class SoftwareVm:
    """A machine's memory and vCPUs.

    Args:
        memory: given up by ``close``.
    """

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._turns = Turns()

    def create_vcpu(self, index: int) -> SoftwareVcpu:
        """Create a vCPU. Raises HostError."""
        return SoftwareVcpu(index, self._memory, self._turns)

    def make_live(self, range_: GpaRange, view: PageState) -> None:
        """Make one view of all pages of the range live, and the other not.

        No vCPU is in the guest meanwhile, and each asks for its pages anew afterwards.

        Raises:
            BackendError: a vCPU does not leave the guest; nothing changed.
        """
        with self._turns.nobody():
            self._memory.make_live(range_, view)

    def note_written(self, range_: GpaRange, view: PageState) -> None:
        """Have code translated anew that the host has just written over.

        Raises:
            BackendError: a vCPU does not leave the guest.
        """
        # Looked at after the bytes were written: what is translated from now on is translated from them.
        if self._memory.holds_code(range_, view):
            with self._turns.nobody():
                self._memory.overwrite_code(range_, view)

    def close(self) -> None:
        """Give up what the host holds; harmless the second time."""
        self._memory.close()
