"""Keeps a thread on the boot CPU for a while."""

from __future__ import annotations

import os
from contextlib import suppress

BOOT_CPU = 0
"""On x86 the CPU that boots Linux is number 0."""

_THERE = {BOOT_CPU}


class BootCpuStay:
    """A stay of one thread on the boot CPU, again and again.

    The place is given by the thread's affinity. So where that keeps the thread off the boot CPU (``taskset``, systemd's
    ``CPUAffinity=``, a cpuset), or on one CPU alone, there is no stay. What the thread starts meanwhile, threads and
    processes, would inherit the place for good: whoever may start something ends the stay before.

    Args:
        thread: its native id; 0 for whichever calls.
    """

    __slots__ = ("_before", "_thread")

    def __init__(self, thread: int = 0) -> None:
        self._thread = thread
        self._before: set[int] | None = None

    def begin(self) -> bool:
        """Keep the thread there until ``end``, and tell whether it is."""
        if self._before is None:
            # The host may forbid either call; then the thread stays where the scheduler likes.
            with suppress(OSError):
                before = os.sched_getaffinity(self._thread)
                if BOOT_CPU in before and len(before) > 1:
                    os.sched_setaffinity(self._thread, _THERE)
                    self._before = before
        return self._before is not None

    def end(self) -> None:
        """Let it go where it could before. Harmless without a stay."""
        before, self._before = self._before, None
        if before is not None:
            with suppress(OSError):
                # Who changed the affinity meanwhile wants it so.
                if os.sched_getaffinity(self._thread) == _THERE:
                    os.sched_setaffinity(self._thread, before)
