"""Gives the event loop up for as long as its other tasks have something to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import trio

PASSES = 16
"""The most passes over its tasks that the event loop makes until the caller goes on."""


class LoopTurn(trio.abc.Instrument):
    """Knows how many tasks of an event loop have a step to make.

    A checkpoint lets each task that can go on make one step. With that alone, what takes a task some steps, such as an
    answer to the daemon, lasts as many turns of a task that keeps the loop to itself for milliseconds.
    """

    def __init__(self) -> None:
        self._ready = 0
        self._counting = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count for the block, in the event loop of the caller's task. Once at a time."""
        self._counting = False
        trio.lowlevel.add_instrument(self)
        try:
            yield
        finally:
            trio.lowlevel.remove_instrument(self)

    async def give(self) -> None:
        """Let the other tasks go on until none of them has a step to make, but for ``PASSES`` passes at most."""
        for _ in range(PASSES):
            await trio.lowlevel.checkpoint()
            if self._counting and not self._ready:
                return

    # -- called by trio ------------------------------------------------------------------------------------------------

    def task_scheduled(self, task: trio.lowlevel.Task) -> None:  # noqa: ARG002 - whichever it is
        """Count a task that can go on."""
        self._ready += 1

    def before_task_step(self, task: trio.lowlevel.Task) -> None:  # noqa: ARG002 - as above
        """Count one less."""
        self._ready -= 1

    def before_io_wait(self, timeout: float) -> None:  # noqa: ARG002 - however long it is
        """Begin to count, between two passes: only there does trio tell how many there are."""
        if not self._counting:
            self._counting = True
            self._ready = trio.lowlevel.current_statistics().tasks_runnable
