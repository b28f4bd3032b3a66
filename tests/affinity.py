"""A host's table of which thread may run on which CPUs."""

from __future__ import annotations

import pytest


class Affinities:
    """Takes the place of the kernel's.

    Attributes:
        masks: CPUs by the thread's native id; 0 is whoever calls.
        calls: changes that were made.
        refuse: the kernel allows none.
    """

    def __init__(self) -> None:
        self.masks: dict[int, set[int]] = {}
        self.calls: list[tuple[int, set[int]]] = []
        self.refuse = False

    def get(self, thread: int) -> set[int]:
        """As ``os.sched_getaffinity``."""
        if thread not in self.masks:
            raise ProcessLookupError(thread)
        return set(self.masks[thread])

    def set(self, thread: int, mask: set[int]) -> None:
        """As ``os.sched_setaffinity``."""
        if self.refuse:
            raise PermissionError(thread)
        self.get(thread)
        self.masks[thread] = set(mask)
        self.calls.append((thread, set(mask)))

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Put it in place of the kernel's."""
        monkeypatch.setattr("os.sched_getaffinity", self.get)
        monkeypatch.setattr("os.sched_setaffinity", self.set)
