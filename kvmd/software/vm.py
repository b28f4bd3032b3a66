"""A virtual machine of the software CPU: memory in views, and vCPUs that take turns."""

from __future__ import annotations

from kvmd.ranges import GpaRange, PageState
from kvmd.software.memory import GuestMemory
from kvmd.software.turns import Runner, Turns
from kvmd.software.vcpu import SoftwareVcpu


class SoftwareVm:
    """A machine's memory and vCPUs.

    Args:
        memory: given up by ``close``.
    """

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._turns = Turns()
        self._vcpus: list[SoftwareVcpu] = []

    def create_vcpu(self, index: int) -> SoftwareVcpu:
        """Create a vCPU, before any runs. Raises HostError."""
        vcpu = SoftwareVcpu(index, self._memory, self._turns)
        self._vcpus.append(vcpu)
        return vcpu

    def make_live(self, range_: GpaRange, view: PageState) -> None:
        """Make one view of all pages of the range live, and the other not.

        A vCPU that runs meanwhile and knows none of these pages runs on: it will have to ask for them. One that does
        is taken out of the guest first. Those that know them and do not run ask for all pages anew.

        Raises:
            BackendError: a vCPU does not leave the guest; nothing changed.
        """
        pages = self._memory.pages(range_, view.opposite)

        def change(running: Runner | None) -> bool:
            with self._memory.lock:
                know = [vcpu for vcpu in self._vcpus if vcpu.knows(*pages)]
                if running in know:
                    return False
                self._memory.make_live(range_, view)
                for vcpu in know:
                    vcpu.distrust()
                return True

        if not self._turns.beside(change):
            with self._turns.nobody():
                change(None)

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
