from __future__ import annotations

import threading

import pytest

from kvmd.errors import BackendError
from kvmd.software import turns as subject
from kvmd.software.turns import Turns

WAIT_S = 20.0


class Runner:
    """Notes when it is asked to end its turn."""

    def __init__(self) -> None:
        self.preempted = threading.Event()

    def preempt(self) -> None:
        self.preempted.set()

    def begin_turn(self) -> None:
        self.preempted.clear()


def never() -> bool:
    return False


def in_thread(turns: Turns, runner: Runner, order: list[Runner]) -> threading.Thread:
    """Return a thread that takes one turn and is in the queue already."""

    def take() -> None:
        assert turns.acquire(runner, never)
        order.append(runner)
        turns.release(runner)

    before = len(turns._queue)
    thread = threading.Thread(target=take)
    thread.start()
    while len(turns._queue) == before:
        threading.Event().wait(0.001)
    return thread


def test_turns_go_to_who_has_waited_longest_and_the_first_asks_for_it() -> None:
    turns, holder, runners = Turns(), Runner(), [Runner() for _ in range(4)]
    assert turns.acquire(holder, never)
    order: list[Runner] = []
    threads = [in_thread(turns, runner, order) for runner in runners]
    assert holder.preempted.wait(WAIT_S)
    assert turns.last is None
    turns.release(holder)
    for thread in threads:
        thread.join()
    assert order == runners
    assert turns.last is runners[-1]


def test_who_waits_alone_keeps_the_turn() -> None:
    turns, runner = Turns(), Runner()
    assert turns.acquire(runner, never)
    assert not runner.preempted.is_set()
    turns.release(runner)
    with pytest.raises(RuntimeError, match="who has the turn"):
        turns.release(runner)


def test_who_is_wanted_elsewhere_does_not_wait() -> None:
    turns, holder, runner = Turns(), Runner(), Runner()
    assert not turns.acquire(runner, lambda: True)
    assert turns.acquire(holder, never)
    wanted = threading.Event()
    results: list[bool] = []
    thread = threading.Thread(target=lambda: results.append(turns.acquire(runner, wanted.is_set)))
    thread.start()
    assert holder.preempted.wait(WAIT_S)
    turns.wake(runner)  # for nothing: it waits on
    wanted.set()
    turns.wake(runner)
    thread.join(WAIT_S)
    assert results == [False]
    turns.release(holder)


def test_nobody_comes_before_others_and_keeps_all_out() -> None:
    turns, holder, runner = Turns(), Runner(), Runner()
    assert turns.acquire(holder, never)
    order: list[Runner] = []
    waiting = in_thread(turns, runner, order)
    inside, leave = threading.Event(), threading.Event()

    def change() -> None:
        with turns.nobody():
            inside.set()
            leave.wait(WAIT_S)

    changing = threading.Thread(target=change)
    changing.start()
    assert holder.preempted.wait(WAIT_S)
    assert not inside.is_set()
    turns.release(holder)
    assert inside.wait(WAIT_S)
    assert order == []
    leave.set()
    waiting.join()
    changing.join()
    assert order == [runner]


def test_a_vcpu_that_does_not_leave_is_told_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "DEADLINE_SECONDS", 0.01)
    turns, holder = Turns(), Runner()
    assert turns.acquire(holder, never)
    with pytest.raises(BackendError, match="did not leave the guest"), turns.nobody():
        pass
    turns.release(holder)
    with turns.nobody():
        assert turns.last is holder
