import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from kvmd.devices.console import ConsoleOutput


@contextmanager
def thread_doing(work: Callable[[], None], output: ConsoleOutput) -> Iterator[threading.Thread]:
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield thread
    finally:
        output.release()
        thread.join(timeout=10)
        assert not thread.is_alive()


def blocked(output: ConsoleOutput) -> bool:
    """Wait until a thread waits for room: the condition has a waiter."""
    deadline = threading.Event()
    for _ in range(10_000):
        with output._room:
            if output._room._waiters:  # type: ignore[attr-defined] # the one way to see a waiter
                return True
        deadline.wait(0.001)
    return False


def test_bytes_come_out_in_order_and_once() -> None:
    output = ConsoleOutput()
    for byte in b"abc":
        output.put(byte)
    assert output.take() == b"abc"
    assert output.take() == b""
    assert output.total_bytes == 3


def test_wake_is_called_only_when_the_buffer_was_empty() -> None:
    woken: list[int] = []
    output = ConsoleOutput(wake=lambda: woken.append(output.total_bytes))
    output.put(1)
    output.put(2)
    output.take()
    output.put(3)
    assert woken == [1, 3]


def test_a_wake_up_set_later_is_told_of_what_waits() -> None:
    output = ConsoleOutput()
    woken: list[str] = []
    output.set_wake(lambda: woken.append("first"))
    assert woken == []
    output.put(1)
    output.set_wake(lambda: woken.append("second"))
    assert woken == ["first", "second"]


def test_a_full_buffer_blocks_until_there_is_room() -> None:
    output = ConsoleOutput(capacity=2)

    def print_three() -> None:
        for byte in b"xyz":
            output.put(byte)

    with thread_doing(print_three, output) as thread:
        assert blocked(output)
        assert output.take() == b"xy"
        thread.join(timeout=10)
        assert not thread.is_alive()
        assert output.take() == b"z"


def test_release_lets_a_blocked_vcpu_go_and_its_byte_is_kept() -> None:
    output = ConsoleOutput(capacity=1)
    output.put(0x41)
    with thread_doing(lambda: output.put(0x42), output) as thread:
        assert blocked(output)
        output.release()
        thread.join(timeout=10)
        assert not thread.is_alive()
    assert output.take() == b"AB"


def test_after_release_nothing_blocks_until_restore() -> None:
    output = ConsoleOutput(capacity=1)
    output.release()
    for byte in b"abcd":
        output.put(byte)
    output.restore()
    with thread_doing(lambda: output.put(0x65), output):
        assert blocked(output)
        assert output.take() == b"abcd"


def test_releases_nest() -> None:
    output = ConsoleOutput(capacity=1)
    output.release()
    output.release()
    output.restore()
    output.put(1)
    output.put(2)
    output.restore()
    with pytest.raises(ValueError, match="without a release"):
        output.restore()


def test_many_vcpus_lose_nothing() -> None:
    output = ConsoleOutput(capacity=7)

    def print_many(byte: int) -> None:
        for _ in range(300):
            output.put(byte)

    threads = [threading.Thread(target=print_many, args=(byte,)) for byte in range(4)]
    for thread in threads:
        thread.start()
    taken = bytearray()
    while len(taken) < 1200:
        taken += output.take()
    for thread in threads:
        thread.join(timeout=10)
    assert [taken.count(byte) for byte in range(4)] == [300] * 4


def test_a_buffer_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one byte"):
        ConsoleOutput(capacity=0)
