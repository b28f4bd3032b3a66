"""The channel from the vCPU threads to the conversion service."""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Iterator

import pytest
import trio

from kvmd import request_channel
from kvmd.errors import BackendError
from kvmd.request_channel import RequestChannel
from kvmd.wait_watch import WaitWatch


class Late:
    """Where items go that come after the end."""

    def __init__(self) -> None:
        self.items: list[int] = []


@pytest.fixture
def late() -> Late:
    return Late()


LINGER_SECONDS = 60.0
"""More than any test takes, but for those that ask for less."""


@pytest.fixture
def channel(late: Late, request: pytest.FixtureRequest) -> Iterator[RequestChannel[int]]:
    seconds = getattr(request, "param", LINGER_SECONDS)
    made: RequestChannel[int] = RequestChannel(late.items.append, linger_seconds=seconds)
    yield made
    made.dispose()
    made.dispose()


def put_all(channel: RequestChannel[int], *items: int) -> None:
    for item in items:
        channel.put(item)


@pytest.fixture
async def quick(
    channel: RequestChannel[int], nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> RequestChannel[int]:
    """A channel with its porter; whatever comes, comes soon."""
    monkeypatch.setattr(request_channel, "SOON_NS", 60_000_000_000)
    nursery.start_soon(channel.carry)
    return channel


async def make_it_pay(channel: RequestChannel[int]) -> None:
    """Let an item come soon after the receiver went idle."""
    assert channel.linger() == []
    await trio.to_thread.run_sync(channel.put, 0)
    assert await channel.receive() == [0]


async def test_what_is_put_is_taken_once_and_in_order(channel: RequestChannel[int]) -> None:
    assert channel.take() == []
    put_all(channel, 0, 1, 2)
    assert channel.count == 3
    assert channel.take() == [0, 1, 2]
    assert (channel.take(), channel.count) == ([], 3)
    put_all(channel, 3)
    assert channel.take() == [3]
    assert channel.count == 4


async def test_what_the_porter_carried_comes_before_what_was_put_later(
    channel: RequestChannel[int], nursery: trio.Nursery
) -> None:
    nursery.start_soon(channel.carry)
    put_all(channel, 1, 2)
    await trio.testing.wait_all_tasks_blocked()
    assert channel._in_channel == 1
    put_all(channel, 3)
    assert channel.take() == [1, 2, 3]


async def test_a_receiver_is_woken_when_a_thread_puts_something(
    channel: RequestChannel[int], nursery: trio.Nursery
) -> None:
    nursery.start_soon(channel.carry)
    got: list[int] = []

    async def receive() -> None:
        got.extend(await channel.receive())

    async with trio.open_nursery() as inner:
        inner.start_soon(receive)
        await trio.testing.wait_all_tasks_blocked()
        await trio.to_thread.run_sync(channel.put, 7)
    assert got == [7]


async def test_what_was_taken_does_not_wake_again(channel: RequestChannel[int], nursery: trio.Nursery) -> None:
    nursery.start_soon(channel.carry)
    channel.put(1)
    assert channel.take() == [1]
    await trio.testing.wait_all_tasks_blocked()
    assert channel.take() == []


async def test_nobody_signals_while_the_receiver_attends(channel: RequestChannel[int], nursery: trio.Nursery) -> None:
    nursery.start_soon(channel.carry)
    channel.attend()
    channel.put(1)
    await trio.testing.wait_all_tasks_blocked()
    assert channel._in_channel == 0, "the porter was not woken"
    assert channel.take() == [1]
    channel.leave()
    channel.put(2)
    assert await channel.receive() == [2]


async def test_an_item_after_the_end_is_too_late_and_one_before_it_is_given_back(
    channel: RequestChannel[int], late: Late, nursery: trio.Nursery
) -> None:
    nursery.start_soon(channel.carry)
    put_all(channel, 1)
    await trio.testing.wait_all_tasks_blocked()
    put_all(channel, 2)
    # One in the trio channel, one in the threads' queue.
    assert sorted(channel.close()) == [1, 2]
    assert channel.close() == []
    put_all(channel, 3)
    assert late.items == [3]
    assert channel.take() == []


async def test_lingering_starts_only_once_items_come_soon(quick: RequestChannel[int]) -> None:
    # Nothing has come yet, so nobody waits: this returns at once.
    await make_it_pay(quick)
    # It came soon after the last look: from now on it pays.
    quick.attend()
    thread = threading.Thread(target=quick.put, args=(2,))
    thread.start()
    assert quick.linger() == [2]
    thread.join()
    put_all(quick, 3, 4)
    assert quick.linger() == [3, 4], "all that is there"


@pytest.mark.parametrize("channel", [0.001], indirect=True)
async def test_lingering_in_vain_is_given_up(quick: RequestChannel[int]) -> None:
    await make_it_pay(quick)
    assert quick.linger() == []
    assert not quick._pays
    assert quick.count == 1
    # And what comes afterwards wakes the loop as before.
    quick.put(4)
    assert await quick.receive() == [4]


async def test_an_end_that_comes_when_nobody_waits_any_more_is_no_item(channel: RequestChannel[int]) -> None:
    channel._end_wait()
    assert (channel.count, channel.take()) == (0, [])
    channel._end_wait()
    channel.put(1)
    assert (channel.count, channel.take()) == (1, [1])
    channel._end_wait()
    assert channel.close() == []


async def test_an_end_that_comes_too_late_ends_one_wait_more(quick: RequestChannel[int]) -> None:
    await make_it_pay(quick)
    quick.put(1)
    quick._end_wait()
    assert quick.linger() == [1]
    assert quick.linger() == []
    await make_it_pay(quick)
    quick.attend()
    thread = threading.Thread(target=quick.put, args=(2,))
    thread.start()
    assert quick.linger() == [2]
    thread.join()


async def test_where_nothing_can_end_a_wait_there_is_none(
    quick: RequestChannel[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WaitWatch, "resume", lambda _watch: False)
    await make_it_pay(quick)
    assert quick.linger() == []
    quick.put(6)
    assert await quick.receive() == [6]


async def test_after_the_end_there_is_nothing_to_linger_for(
    quick: RequestChannel[int], late: Late, monkeypatch: pytest.MonkeyPatch
) -> None:
    await make_it_pay(quick)
    quick.attend()
    assert quick.close() == []
    monkeypatch.setattr(WaitWatch, "resume", lambda _watch: pytest.fail("it waits"))
    assert quick.linger() == []
    quick.put(1)
    assert (quick.linger(), late.items) == ([], [1])


@pytest.mark.parametrize("left", [0, 1])
def test_without_two_descriptors_it_says_what_to_raise_and_keeps_none(left: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + left, hard))
    try:
        with pytest.raises(BackendError, match=r"no eventfd .* Too many open files; raise LimitNOFILE="):
            RequestChannel[int](lambda _item: None)
        if left:
            os.close(os.dup(0))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_lingering_never_waits_while_something_is_in_the_trio_channel(quick: RequestChannel[int]) -> None:
    await make_it_pay(quick)
    quick.put(5)
    await trio.testing.wait_all_tasks_blocked()
    assert quick._in_channel == 1
    assert quick.linger() == [5]


@pytest.mark.parametrize("channel", [0.00005, 0.005], indirect=True)
async def test_no_item_is_lost_or_doubled_whatever_the_loop_is_doing(channel: RequestChannel[int]) -> None:
    """Threads put while the loop waits, lingers, or just takes: the three ways by which it can learn of items."""
    threads, each = 4, 3000
    got: list[int] = []

    async with trio.open_nursery() as nursery:
        nursery.start_soon(channel.carry)
        async with trio.open_nursery() as senders:
            for index in range(threads):
                items = range(index * each, (index + 1) * each)
                senders.start_soon(trio.to_thread.run_sync, put_all, channel, *items)
            while len(got) < threads * each:
                got.extend(await channel.receive())
                channel.attend()
                while items_now := channel.linger():
                    got.extend(items_now)
                    if len(got) % 3 == 0:
                        await trio.lowlevel.checkpoint()
                channel.leave()
                got.extend(channel.take())
        nursery.cancel_scope.cancel()
    assert channel.count == threads * each
    assert sorted(got) == list(range(threads * each))
    for index in range(threads):
        mine = [item for item in got if index * each <= item < (index + 1) * each]
        assert mine == sorted(mine)


async def test_each_item_around_the_end_has_one_owner(channel: RequestChannel[int], late: Late) -> None:
    threads, each = 4, 2000
    going = threading.Barrier(threads + 1)

    def send(first: int) -> None:
        going.wait()
        put_all(channel, *range(first, first + each))

    workers = [threading.Thread(target=send, args=(index * each,)) for index in range(threads)]
    for worker in workers:
        worker.start()
    going.wait()
    given_back = channel.take() + channel.close()
    for worker in workers:
        worker.join()
    assert sorted(given_back + late.items) == list(range(threads * each))
