"""What a thread blocks on until another rings."""

from __future__ import annotations

import os
import resource
import signal
import threading
from collections.abc import Iterator

import pytest

from kvmd.bell import Bell
from kvmd.errors import BackendError


@pytest.fixture
def bell() -> Iterator[Bell]:
    with Bell() as made:
        yield made
        made.close()


def test_a_ring_wakes_who_waits(bell: Bell) -> None:
    woken: list[int] = []

    def wait() -> None:
        for number in range(200):
            bell.wait()
            woken.append(number)
            answers.ring()

    with Bell() as answers:
        thread = threading.Thread(target=wait)
        thread.start()
        for number in range(200):
            bell.ring()
            answers.wait()
            assert woken[-1] == number
        thread.join()


def test_rings_that_nobody_waited_for_are_one(bell: Bell) -> None:
    for _ in range(3):
        bell.ring()
    bell.wait()
    over = threading.Event()

    def wait() -> None:
        bell.wait()
        over.set()

    thread = threading.Thread(target=wait)
    thread.start()
    assert not over.wait(0.05)
    bell.ring()
    thread.join()


def test_a_signal_ends_no_wait(bell: Bell) -> None:
    """A vCPU's thread is kicked by one, wherever it is just then."""
    handled: list[int] = []
    rang = threading.Event()
    before = signal.signal(signal.SIGUSR2, lambda number, _: handled.append(number))
    ends: list[bool] = []

    def wait() -> None:
        bell.wait()
        ends.append(rang.is_set())

    try:
        thread = threading.Thread(target=wait)
        thread.start()
        while len(handled) < 200:
            signal.pthread_kill(thread.ident or 0, signal.SIGUSR2)
        rang.set()
        bell.ring()
        thread.join()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert ends == [True]


def test_without_a_descriptor_it_says_what_to_raise(bell: Bell) -> None:
    bell.ring()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = os.dup(0)
    os.close(taken)
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken, hard))
    try:
        with pytest.raises(BackendError, match=r"no eventfd .* Too many open files; raise LimitNOFILE="):
            Bell()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
