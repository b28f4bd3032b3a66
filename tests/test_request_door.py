"""The door from the vCPU threads to the event loop."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import trio

from kvmd import request_door
from kvmd.request_door import RequestDoor


@pytest.fixture
def door() -> Iterator[RequestDoor[int]]:
    made: RequestDoor[int] = RequestDoor()
    yield made
    made.dispose()
    made.dispose()


async def test_what_is_put_is_taken_once_and_in_order(door: RequestDoor[int]) -> None:
    assert door.take() == []
    for item in range(5):
        assert door.put(item)
    assert door.count == 5
    assert await door.wait() == [0, 1, 2, 3, 4]
    assert door.take() == []
    assert door.put(5)
    assert door.take() == [5]


async def test_waiting_ends_when_a_thread_puts_something(door: RequestDoor[int]) -> None:
    waiting = trio.Event()
    got: list[int] = []

    async def wait() -> None:
        waiting.set()
        got.extend(await door.wait())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await waiting.wait()
        await trio.to_thread.run_sync(door.put, 7)
    assert got == [7]


async def test_what_was_taken_does_not_wake_again(door: RequestDoor[int]) -> None:
    door.put(1)
    assert door.take() == [1]
    with trio.move_on_after(0.02) as scope:
        await door.wait()
    assert scope.cancelled_caught


def test_a_closed_door_lets_nothing_in(door: RequestDoor[int]) -> None:
    door.put(1)
    assert door.close() == [1]
    assert not door.put(2)
    assert door.take() == []
    assert door.close() == []
    assert door.count == 1


async def test_lingering_starts_only_once_items_come_soon(
    door: RequestDoor[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_door, "LINGER_SECONDS", 30.0)
    asked: list[float] = []
    await_arrival = door._await_arrival

    def watch(seconds: float) -> bool:
        asked.append(seconds)
        return await_arrival(seconds)

    monkeypatch.setattr(door, "_await_arrival", watch)
    assert door.linger(60.0) == []
    assert asked == [], "nothing has come yet, so nobody waits"
    door.put(1)
    assert await door.wait() == [1]
    # It came within LINGER_SECONDS of the last look: from now on it pays.
    thread = threading.Thread(target=door.put, args=(2,))
    thread.start()
    assert door.linger(60.0) == [2]
    thread.join()
    assert asked == [30.0], "never longer than LINGER_SECONDS"
    door.put(3)
    assert door.linger(0.0) == [3], "no time left: take what is there and go"
    assert len(asked) == 1


async def test_lingering_in_vain_is_given_up(door: RequestDoor[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_door, "LINGER_SECONDS", 0.001)
    door._pays = True
    assert door.linger(1.0) == []
    assert not door._pays
    # And what comes afterwards wakes the loop as before.
    door.put(4)
    assert await door.wait() == [4]


async def test_no_item_is_lost_or_doubled_whatever_the_loop_is_doing(
    door: RequestDoor[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads hand in while the loop waits, lingers, or just takes: the three ways by which it can learn of them."""
    monkeypatch.setattr(request_door, "LINGER_SECONDS", 0.0001)
    threads, each = 4, 3000
    got: list[int] = []

    def hand_in(first: int) -> None:
        for item in range(first, first + each):
            assert door.put(item)

    async with trio.open_nursery() as nursery:
        for index in range(threads):
            nursery.start_soon(trio.to_thread.run_sync, hand_in, index * each)
        while len(got) < threads * each:
            got.extend(await door.wait() if len(got) % 3 == 0 and not door._items else door.take())
            door._pays = True
            got.extend(door.linger(0.0001))
            if len(got) < threads * each:
                await trio.lowlevel.checkpoint()
    assert sorted(got) == list(range(threads * each))
    for index in range(threads):
        mine = [item for item in got if index * each <= item < (index + 1) * each]
        assert mine == sorted(mine)
