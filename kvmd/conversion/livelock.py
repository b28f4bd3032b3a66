"""Notices an instruction that can never complete, since it needs both views of a page at once.

``movsb`` from the shared to the private view of one page faults on the one, then on the other, for ever. Each fault is
a real conversion, so nothing in the page state tells it from an honest guest. The registers do: between two faults of
such an instruction none of them changes.

Reading the registers costs some microseconds, so they are read for a few faults only: samples now and then, and where
two samples are equal, a run of faults one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

FIRST_SAMPLE = 256
"""Faults in a row, with no other exit between them, before the first look at the registers."""

SAMPLE_EVERY = 64
"""Faults between two samples."""

MOST_SPACING = 4096
"""Faults between two samples of a guest that looked stuck and was not."""

STUCK_AFTER = 1000
"""Faults in a row with equal registers that end the machine. An honest instruction needs a page or two, and loses
against other vCPUs now and then, but not a thousand times."""

T = TypeVar("T")


class LivelockWatch(Generic[T]):
    """Watches the faults of one vCPU.

    Args:
        registers: reads the vCPU's registers; called rarely.
    """

    def __init__(self, registers: Callable[[], T]) -> None:
        self._registers = registers
        self.progress()
        self._spacing = SAMPLE_EVERY

    def progress(self) -> None:
        """Note an exit that is no fault: the guest went on."""
        self._faults = 0
        self._next_look = FIRST_SAMPLE
        self._last: T | None = None
        self._equal = 0

    def fault(self) -> bool:
        """Note a fault. Tells whether the guest is stuck for good."""
        self._faults += 1
        if self._faults < self._next_look:
            return False
        seen = self._registers()
        if seen != self._last:
            if self._equal > 1:
                # It only looked like it: look less often, so that such a guest does not pay for it.
                self._spacing = min(self._spacing * 2, MOST_SPACING)
            self._last = seen
            self._equal = 1
            self._next_look = self._faults + self._spacing
            return False
        self._equal += 1
        self._next_look = self._faults + 1
        return self._equal > STUCK_AFTER
