"""Accesses to addresses that nothing backs, of one instruction at a time, until it has been completed.

An access is told (``Mmio``) with its instruction not begun. What the machine answers is kept here, and the instruction
is then run alone: its loads find the answers in a page of the emulator's own, and its stores go to another, where
nobody looks. An instruction with several accesses is told them one by one, and begun again each time.
"""

from __future__ import annotations

from kvmd.hv.exits import Mmio
from kvmd.software.memory import page_start
from kvmd.units import PAGE_MASK, PAGE_SIZE

_NOTHING_THERE = 0xFF
"""What is read where nobody answers."""


class MmioAccesses:
    """What is known of the instruction that is being completed.

    Attributes:
        pending: the access that was told last, not yet answered or taken note of.
        rip: where the instruction is.
    """

    def __init__(self) -> None:
        self.pending: Mmio | None = None
        self.rip = 0
        self._loads: dict[int, bytearray] = {}
        self._stores: set[int] = set()

    @property
    def is_open(self) -> bool:
        """Whether an instruction has to be completed."""
        return self.pending is not None or bool(self._loads) or bool(self._stores)

    def tell(self, access: Mmio, rip: int) -> None:
        """Note an access of the instruction at ``rip``."""
        if rip != self.rip:
            self.clear()
        self.rip = rip
        self.pending = access

    def settle(self, data: bytes | None = None) -> None:
        """Note the answer of the pending load, or that the pending store was taken; harmless where none is pending."""
        access, self.pending = self.pending, None
        if access is None:
            return
        page = page_start(access.gpa)
        if access.is_write:
            self._stores.add(page)
            return
        answers = self._loads.setdefault(page, bytearray([_NOTHING_THERE]) * PAGE_SIZE)
        offset = access.gpa & PAGE_MASK
        answers[offset : offset + access.size] = data or bytes([_NOTHING_THERE]) * access.size

    def loads(self) -> list[tuple[int, bytes]]:
        """Return the pages that were answered, each as its gpa and its contents."""
        return [(page, bytes(answers)) for page, answers in self._loads.items()]

    def takes_store(self, page: int) -> bool:
        """Tell whether stores to a page were told already."""
        return page in self._stores

    def clear(self) -> None:
        """Forget the instruction: it is completed."""
        self.pending = None
        self._loads.clear()
        self._stores.clear()
