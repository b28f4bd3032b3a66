"""What became of a machine, step by step: numbered, so that a reader can come back."""

from __future__ import annotations

from collections import deque
from typing import Literal

import msgspec

KEPT = 1024
"""Events that are kept in memory: a client that pauses and resumes a thousand times a second gets no further."""

Change = Literal["created", "started", "paused", "resumed", "stopped"]


class LifecycleEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """One step.

    Attributes:
        number: from 1, without gaps.
        wall_ns: nanoseconds since the epoch.
        change: what happened.
        state: the machine's state from then on.
        reason, message, status, signal: at the end, how it ended.
    """

    number: int
    wall_ns: int
    change: Change
    state: str
    reason: str = ""
    message: str = ""
    status: int | None = None
    signal: int | None = None


class LifecycleLog:
    """The last steps of one machine."""

    def __init__(self) -> None:
        self._events: deque[LifecycleEvent] = deque(maxlen=KEPT)

    @property
    def last(self) -> int:
        """The number of the last event, 0 before the first."""
        return self._events[-1].number if self._events else 0

    @property
    def ended(self) -> bool:
        """Whether the last event was the machine's end."""
        return bool(self._events) and self._events[-1].change == "stopped"

    def append(self, event: LifecycleEvent) -> None:
        """Add the next event.

        Raises:
            ValueError: its number is not the next one.
        """
        if self._events and event.number != self.last + 1:
            raise ValueError(f"event {event.number} does not follow {self.last}")
        self._events.append(event)

    def after(self, number: int, *, until_ns: int | None = None) -> tuple[int, list[LifecycleEvent]]:
        """Return how many events after ``number`` are gone, and the others.

        Args:
            number: of the last one that is known.
            until_ns: leave out those that came later.
        """
        found = [event for event in self._events if event.number > number]
        lost = found[0].number - number - 1 if found else 0
        return lost, [event for event in found if until_ns is None or event.wall_ns <= until_ns]
