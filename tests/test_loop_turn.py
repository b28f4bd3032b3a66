"""How long a task that hogs the event loop lets others go on."""

from __future__ import annotations

import trio

from kvmd.loop_turn import PASSES, give_turn


async def steps(count: int, made: list[int]) -> None:
    """Take so many steps, and no more."""
    for step in range(count):
        made.append(step)
        await trio.lowlevel.checkpoint()


async def test_a_chain_of_steps_is_made_in_one_turn() -> None:
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
        await give_turn()
        assert made == [0, 1, 2, 3]


async def test_who_never_stops_is_stopped() -> None:
    made: list[int] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(steps, 10 * PASSES, made)
        await give_turn()
        # Who comes first in a pass is left to chance.
        assert PASSES - 1 <= len(made) <= PASSES + 1


async def test_where_nobody_has_anything_to_do_it_is_two_passes() -> None:
    me = trio.lowlevel.current_task()
    passes: list[trio.lowlevel.Task] = []

    class Mine(trio.abc.Instrument):
        def before_task_step(self, task: trio.lowlevel.Task) -> None:
            passes.append(task)

    instrument = Mine()
    trio.lowlevel.add_instrument(instrument)
    await give_turn()
    trio.lowlevel.remove_instrument(instrument)
    assert passes == [me, me]


async def test_cancelling_it_leaves_nothing_behind() -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await give_turn()
    assert scope.cancelled_caught
    await test_where_nobody_has_anything_to_do_it_is_two_passes()
