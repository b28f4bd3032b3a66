"""Gives the event loop up for as long as its other tasks have something to do."""

from __future__ import annotations

import trio

PASSES = 16
"""The most passes over its tasks that the event loop makes until the caller goes on."""

_IDLE_PASSES = 2
"""A task may have a step before the caller's in one pass, and after it in the next."""


class _Steps(trio.abc.Instrument):
    """Counts the steps of all tasks."""

    def __init__(self) -> None:
        self.made = 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:  # noqa: ARG002 - whoever it is
        """Count one."""
        self.made += 1


async def give_turn() -> None:
    """Let the other tasks go on until none of them makes a step any more, but for ``PASSES`` passes at most.

    A checkpoint is one pass, this two at least. With one, what takes a task some steps, such as an answer to the
    daemon, lasts as many turns of a task that keeps the loop to itself for milliseconds.
    """
    steps = _Steps()
    trio.lowlevel.add_instrument(steps)
    try:
        idle = 0
        for _ in range(PASSES):
            before = steps.made
            await trio.lowlevel.checkpoint()
            idle = idle + 1 if steps.made == before + 1 else 0  # the caller's own step
            if idle == _IDLE_PASSES:
                return
    finally:
        trio.lowlevel.remove_instrument(steps)
