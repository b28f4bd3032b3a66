"""The thread that ends waits which have no timeout."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

import pytest

from kvmd.wait_watch import WaitWatch

SECONDS = 0.001
MOST = 60.0
"""How long a test waits for what must come."""


class Waits:
    """One thread's waits at a queue, where None ends a wait."""

    def __init__(self) -> None:
        self.queue: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self.made = 0
        self.watch = WaitWatch(SECONDS, lambda: self.made, lambda: self.queue.put(None))

    def wait(self) -> int | None:
        self.watch.waiting = True
        assert self.watch.watching or self.watch.resume()
        item = self.queue.get(timeout=MOST)
        self.watch.waiting = False
        self.made += item is not None
        return item


@pytest.fixture
def waits() -> Iterator[Waits]:
    made = Waits()
    yield made
    made.watch.close()
    made.watch.close()


def test_a_wait_in_vain_is_ended_each_time(waits: Waits) -> None:
    assert [waits.wait() for _ in range(20)] == [None] * 20


def test_a_wait_that_has_something_to_take_is_not_ended(waits: Waits) -> None:
    for item in range(1000):
        waits.queue.put(item)
    got = [item for item in (waits.wait() for _ in range(1000)) if item is not None]
    assert got == list(range(len(got)))
    assert waits.made == len(got) > 900, "an end may come late, on a busy machine"


def test_it_rests_when_nobody_waits_and_takes_up_again(waits: Waits) -> None:
    waits.watch.resume()
    pause = threading.Event()
    while waits.watch.watching:
        pause.wait(SECONDS)
    assert waits.wait() is None


def test_who_begins_to_wait_just_as_it_ceases_to_watch_is_noticed() -> None:
    ended: queue.SimpleQueue[None] = queue.SimpleQueue()

    class Ceasing(WaitWatch):
        """Somebody begins to wait, and found that it was watched, right before it is not."""

        def __setattr__(self, name: str, value: object) -> None:
            if name == "watching" and value is False and hasattr(self, "_thread"):
                self.waiting = True
            super().__setattr__(name, value)

    watch = Ceasing(SECONDS, lambda: 0, lambda: ended.put(None))
    try:
        watch.resume()
        ended.get(timeout=MOST)
        assert watch.watching
    finally:
        watch.close()


def test_without_a_thread_nobody_is_to_wait(waits: Waits, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", fail)
        assert not waits.watch.resume()
        assert not waits.watch.watching
    assert waits.wait() is None, "there is one again"


def test_closing_one_that_never_watched_does_nothing() -> None:
    WaitWatch(SECONDS, lambda: 0, lambda: None).close()
