"""Who runs: one vCPU of a machine at a time, in turn, or nobody while its memory changes hands.

An emulated instruction is several of the host's, so two emulators that run at once tear each other's LOCK-prefixed
instructions apart. Taking turns makes every guest instruction atomic, and a change of memory has no vCPU to race.

A turn ends when its vCPU leaves the guest, or when others have waited for a slice: then whoever waits first asks it to
leave. No thread is needed for the clock: who does not wait for a turn needs no slices.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from kvmd.errors import BackendError

SLICE_SECONDS = 0.002
"""How long a vCPU may run while others wait. Changing over costs about 0.2 ms."""

DEADLINE_SECONDS = 5.0
"""A vCPU that has not ended its turn by then never will: a bug of the emulator's."""


class Runner(Protocol):
    """A vCPU that takes turns."""

    def preempt(self) -> None:
        """End the turn soon. From any thread, under the lock of the turns; never blocks."""

    def begin_turn(self) -> None:
        """Forget what ``preempt`` asked for in an earlier turn. Under the lock of the turns."""


class _Ticket:
    """A place in the queue."""

    __slots__ = ("granted", "runner", "woken")

    def __init__(self, runner: Runner | None) -> None:
        self.runner = runner
        self.granted = False
        self.woken = threading.Event()


class Turns:
    """The turns of one machine's vCPUs.

    Attributes:
        last: who had the turn last, or has it now.
    """

    def __init__(self) -> None:
        self.last: Runner | None = None
        self._lock = threading.Lock()
        self._queue: deque[_Ticket] = deque()
        self._holder: _Ticket | None = None
        self._since = 0.0

    def acquire(self, runner: Runner, unless: Callable[[], bool]) -> bool:
        """Wait for the turn. Returns false, without it, where ``unless`` is true or becomes so before ``wake``."""
        ticket = _Ticket(runner)
        with self._lock:
            if unless():
                return False
            if self._holder is None:
                self._grant(ticket)
                return True
            self._queue.append(ticket)
            before = len(self._queue)
        while True:
            # Only the first has to watch the clock: the others look less often, the further behind they are.
            ticket.woken.wait(before * SLICE_SECONDS)
            with self._lock:
                if ticket.granted:
                    return True
                if ticket.woken.is_set():
                    if unless():
                        self._queue.remove(ticket)
                        return False
                    ticket.woken.clear()
                before = self._queue.index(ticket) + 1
                if self._queue[0] is ticket and time.monotonic() - self._since >= SLICE_SECONDS:
                    self._preempt()

    def release(self, runner: Runner) -> None:
        """End the runner's turn, which goes to whoever has waited longest."""
        with self._lock:
            if self._holder is None or self._holder.runner is not runner:
                raise RuntimeError("only who has the turn can end it")
            self._next()

    def wake(self, runner: Runner) -> None:
        """Make the runner's ``acquire`` return, if it waits. From any thread."""
        with self._lock:
            for ticket in self._queue:
                if ticket.runner is runner:
                    ticket.woken.set()

    def beside(self, attempt: Callable[[Runner | None], bool]) -> bool:
        """Do something while no turn begins or ends.

        Args:
            attempt: gets who has the turn, and returns whether it was possible beside that one. Must not block.
        """
        with self._lock:
            return attempt(None if self._holder is None else self._holder.runner)

    @contextmanager
    def nobody(self) -> Iterator[None]:
        """Keep all vCPUs out of the guest: before others that wait, after the one that runs.

        Raises:
            BackendError: the one that runs does not end its turn.
        """
        ticket = _Ticket(None)
        with self._lock:
            if self._holder is None:
                self._grant(ticket)
            else:
                self._queue.appendleft(ticket)
                self._preempt()
        if not ticket.granted:
            self._await(ticket)
        try:
            yield
        finally:
            with self._lock:
                self._next()

    def _await(self, ticket: _Ticket) -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not ticket.woken.wait(SLICE_SECONDS):
            with self._lock:
                if ticket.granted:
                    return
                if time.monotonic() >= deadline:
                    self._queue.remove(ticket)
                    raise BackendError(
                        f"a vCPU of the software CPU did not leave the guest within {DEADLINE_SECONDS:.0f} s of a kick"
                    )
                # Another of these may have come between and gone, and a new turn begun.
                self._preempt()

    def _preempt(self) -> None:
        if self._holder is not None and self._holder.runner is not None:
            self._holder.runner.preempt()

    def _grant(self, ticket: _Ticket) -> None:
        self._holder = ticket
        self._since = time.monotonic()
        ticket.granted = True
        if ticket.runner is not None:
            ticket.runner.begin_turn()
        ticket.woken.set()

    def _next(self) -> None:
        if self._holder is not None and self._holder.runner is not None:
            self.last = self._holder.runner
        self._holder = None
        if self._queue:
            self._grant(self._queue.popleft())
        if self._queue and self._queue[0].runner is not None:
            self._queue[0].woken.set()  # it is the first now, and has to watch the clock
