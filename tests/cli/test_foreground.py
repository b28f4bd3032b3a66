"""What the operator's signals do to a guest in the foreground; the clock is trio's."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import structlog
import trio
import trio.testing
from structlog.testing import capture_logs
from trio.testing import MockClock

from kvmd.cli.foreground import watch_signals
from kvmd.runnable import SHUTDOWN_SECONDS
from kvmd.stop import NOT_SHUT_DOWN, STOPPED, ExitStatus


class Guest:
    """What is asked of a guest, and when."""

    def __init__(self, *, has_button: bool) -> None:
        self.asked: list[tuple[str, float]] = []
        self.power_button: Callable[[], None] | None = self._press if has_button else None
        self._start = trio.current_time()

    def stop(self, message: str = STOPPED) -> None:
        self._note(message)

    def _press(self) -> None:
        self._note("button")

    def _note(self, what: str) -> None:
        self.asked.append((what, trio.current_time() - self._start))


@asynccontextmanager
async def watched(*, has_button: bool) -> AsyncIterator[Guest]:
    guest = Guest(has_button=has_button)
    async with trio.open_nursery() as nursery:
        await nursery.start(watch_signals, guest, structlog.get_logger())
        yield guest
        nursery.cancel_scope.cancel()


async def send(number: signal.Signals) -> None:
    signal.raise_signal(number)
    await trio.testing.wait_all_tasks_blocked()


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the statuses that this process would have ended with."""
    statuses: list[int] = []
    monkeypatch.setattr(os, "_exit", statuses.append)
    return statuses


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_a_guest_with_a_power_button_is_asked_and_stopped_after_a_limit(
    autojump_clock: MockClock,  # noqa: ARG001 - a clock that jumps
    ended: list[int],
    number: signal.Signals,
) -> None:
    with capture_logs() as log:
        async with watched(has_button=True) as guest:
            await send(number)
            assert guest.asked == [("button", 0.0)]
            await trio.sleep(SHUTDOWN_SECONDS - 0.001)
            assert len(guest.asked) == 1
            await trio.sleep(1)
    assert guest.asked == [("button", 0.0), (NOT_SHUT_DOWN, SHUTDOWN_SECONDS)]
    assert [event["event"] for event in log] == ["shutting-down", "not-shut-down"]
    assert log[0]["signal"] == number.name
    assert ended == []


async def test_a_second_signal_stops_it_at_once_and_a_third_ends_the_process(
    autojump_clock: MockClock,  # noqa: ARG001 - a clock that jumps
    ended: list[int],
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    async with watched(has_button=True) as guest:
        for number in (signal.SIGINT, signal.SIGINT):
            await send(number)
        assert guest.asked == [("button", 0.0), (NOT_SHUT_DOWN, 0.0)]
        assert ended == []
        signal.raise_signal(signal.SIGTERM)
        assert ended == [ExitStatus.KILLED]
    assert b"kvmd: ended at once by another SIGTERM" in capfdbinary.readouterr().err


async def test_after_the_limit_the_next_signal_ends_the_process(
    autojump_clock: MockClock,  # noqa: ARG001 - a clock that jumps
    ended: list[int],
) -> None:
    async with watched(has_button=True):
        await send(signal.SIGTERM)
        await trio.sleep(SHUTDOWN_SECONDS + 1)
        signal.raise_signal(signal.SIGTERM)
        assert ended == [ExitStatus.KILLED]


async def test_a_guest_that_shuts_down_in_time_is_not_stopped(
    autojump_clock: MockClock,  # noqa: ARG001 - a clock that jumps
) -> None:
    async with watched(has_button=True) as guest:
        await send(signal.SIGINT)
        await trio.sleep(SHUTDOWN_SECONDS / 2)
    # Its end is what cancels the watch.
    await trio.sleep(SHUTDOWN_SECONDS)
    assert guest.asked == [("button", 0.0)]


async def test_a_guest_without_one_is_stopped_at_once(
    autojump_clock: MockClock,  # noqa: ARG001 - a clock that jumps
    ended: list[int],
) -> None:
    async with watched(has_button=False) as guest:
        await send(signal.SIGINT)
        assert guest.asked == [(STOPPED, 0.0)]
        signal.raise_signal(signal.SIGINT)
        assert ended == [ExitStatus.KILLED]
