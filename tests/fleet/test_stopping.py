"""All machines stopped at once: by their guests, by their processes, by force."""

from __future__ import annotations

import os
import signal
from functools import partial

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock

from kvmd.fleet import stopping
from kvmd.fleet.local import LocalFleet
from kvmd.guests import GUESTS
from kvmd.spec.machine import MachineSpec
from kvmd.stop import NOT_SHUT_DOWN
from kvmd.stop import STOPPED as STOPPED_BY_OPERATOR
from tests.fleet.conftest import Site, opened, pid_of, spec
from tests.fleet.test_contract import STOPPED
from tests.fleet.test_guest_devices import MEMORY, linux

SECONDS = 60.0
DEADLINE_SECONDS = 10.0
"""Less than a machine has to answer, so that it is not given up for its silence first."""


async def _of_all_kinds(fleet: LocalFleet) -> None:
    """Make machines: one that shuts down, one that does not, a paused one, a payload, and one that never started."""
    for name in ("polite", "stubborn", "paused"):
        await linux(fleet, name)
    await fleet.pause("paused")
    await fleet.create(spec("payload"), owner_uid=7)
    await fleet.start("payload")
    await fleet.create(MachineSpec(kernel=GUESTS["echo"].path, name="created", memory=MEMORY), owner_uid=7)


def _ends(fleet: LocalFleet) -> dict[str, tuple[str, str]]:
    return {machine.name: (machine.end.reason, machine.end.message) for machine in fleet.machines() if machine.end}


_IN_ORDER = {
    "created": ("killed", "killed by the operator"),
    "paused": ("operator", STOPPED_BY_OPERATOR),
    "payload": ("operator", STOPPED_BY_OPERATOR),
    "polite": ("guest-power-off", "the guest powered off"),
    "stubborn": ("operator", NOT_SHUT_DOWN),
}


async def test_all_machines_are_stopped_in_order(
    fake_site: Site, monkeypatch: pytest.MonkeyPatch, mock_clock: MockClock
) -> None:
    monkeypatch.setattr(stopping, "SHUTDOWN_SECONDS", 1000.0)
    mock_clock.rate = 1

    def said() -> set[tuple[str, str]]:
        return {(event["event"], event["machine"]) for event in log if "shut" in event["event"]}

    async with fake_site.open_local() as fleet:
        await _of_all_kinds(fleet)
        with capture_logs() as log:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fleet.stop_all, SECONDS)
                with trio.fail_after(SECONDS):
                    for name in _IN_ORDER.keys() - {"stubborn"}:
                        await fleet.wait(name, STOPPED)
                    while ("machine-shutting-down", "stubborn") not in said():  # noqa: ASYNC110 - a log wakes nobody
                        await trio.sleep(0.005)
                # All but one have come to their end, however long that took: now the time of that one is over.
                mock_clock.jump(1000.0)
                with trio.fail_after(SECONDS):
                    await fleet.wait("stubborn", STOPPED)
        assert _ends(fleet) == _IN_ORDER
    assert said() == {
        ("machine-shutting-down", "polite"),
        ("machine-shutting-down", "stubborn"),
        ("machine-not-shut-down", "stubborn"),
    }


async def test_who_is_in_a_hurry_does_not_wait_for_guests_to_shut_down(
    fake_site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopping, "SHUTDOWN_SECONDS", 1000.0)
    async with fake_site.open_local() as fleet:
        await _of_all_kinds(fleet)
        hurry = trio.Event()
        with trio.fail_after(SECONDS):
            async with trio.open_nursery() as nursery, fleet.console("stubborn") as console:
                nursery.start_soon(partial(fleet.stop_all, SECONDS, hurry=hurry))
                await fleet.wait("polite", STOPPED)
                printed = b""
                while b"no\n" not in printed:
                    printed += await console.receive()
                hurry.set()
        assert _ends(fleet) == _IN_ORDER


async def test_without_time_nobody_is_asked(fake_site: Site) -> None:
    async with fake_site.open_local() as fleet:
        await _of_all_kinds(fleet)
        await fleet.stop_all(0)
        assert {reason for reason, _ in _ends(fleet).values()} == {"killed"}


async def test_stopping_everything_has_a_deadline(local_site: Site, mock_clock: MockClock) -> None:
    mock_clock.rate = 1
    async with opened(local_site) as fleet:
        for name in ("running", "stopped-by-signal", "created"):
            await fleet.create(spec(name), owner_uid=0)
        await fleet.start("running")
        await fleet.start("stopped-by-signal")
        silent = pid_of(fleet.machine("stopped-by-signal"))
        os.kill(silent, signal.SIGSTOP)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fleet.stop_all, DEADLINE_SECONDS)
            await fleet.wait("running", STOPPED)
            # That one was in time, however long it took.
            mock_clock.jump(DEADLINE_SECONDS)
        reasons = {machine.name: machine.end.reason for machine in fleet.machines() if machine.end}
        assert reasons == {"running": "operator", "stopped-by-signal": "killed", "created": "killed"}
