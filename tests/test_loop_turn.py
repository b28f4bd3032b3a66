"""How long a task that hogs the event loop lets others go on."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import trio

from kvmd.loop_turn import PASSES, LoopTurn


@pytest.fixture
async def turn() -> AsyncIterator[LoopTurn]:
    made = LoopTurn()
    with made.watching():
        await made.give()
        yield made


async def steps(count: int, made: list[int]) -> None:
    """Take so many steps, and no more."""
    for step in range(count):
        made.append(step)
        await trio.lowlevel.checkpoint()


async def test_a_chain_of_steps_is_made_in_one_turn(turn: LoopTurn) -> None:
    made: list[int] = []
    send, receive = trio.open_memory_channel[int](0)

    async def pass_on() -> None:
        async for step in receive:
            made.append(step)  # noqa: PERF401 - each as it comes

    async def hand_in() -> None:
        async with send:
            for step in range(4):
                await send.send(step)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(pass_on)
        nursery.start_soon(hand_in)
        await turn.give()
        assert made == [0, 1, 2, 3]


async def test_who_never_stops_is_stopped(turn: LoopTurn) -> None:
    made: list[int] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(steps, 10 * PASSES, made)
        await turn.give()
        # Who comes first in a pass is left to chance.
        assert PASSES - 1 <= len(made) <= PASSES


async def test_where_nobody_has_anything_to_do_it_is_one_pass(turn: LoopTurn) -> None:
    me = trio.lowlevel.current_task()
    passes: list[trio.lowlevel.Task] = []

    class Mine(trio.abc.Instrument):
        def before_task_step(self, task: trio.lowlevel.Task) -> None:
            passes.append(task)

    instrument = Mine()
    trio.lowlevel.add_instrument(instrument)
    for _ in range(20):
        await turn.give()
    trio.lowlevel.remove_instrument(instrument)
    assert passes == [me] * 20


async def test_it_may_begin_among_tasks_that_can_go_on() -> None:
    for busy in range(5):
        made: list[int] = []
        turn = LoopTurn()
        async with trio.open_nursery() as nursery:
            for _ in range(busy):
                nursery.start_soon(steps, 5, made)
            with turn.watching():
                await turn.give()
                assert len(made) == 5 * busy
                await turn.give()
                nursery.start_soon(steps, 5, made)
                await turn.give()
        assert len(made) == 5 * (busy + 1)


async def test_cancelling_it_leaves_nothing_behind(turn: LoopTurn) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await turn.give()
    assert scope.cancelled_caught
    made: list[int] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(steps, 5, made)
        await turn.give()
        assert len(made) == 5
