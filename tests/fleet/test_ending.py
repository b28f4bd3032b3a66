"""Machines that end without a word: what is known of it, and what is left."""

from __future__ import annotations

import os
import signal
from contextlib import suppress

import pytest
import trio

from kvmd.errors import MachineStateError
from kvmd.fleet.base import Event
from kvmd.machine_process.folder import MachineFolder
from kvmd.machine_process.kept_conversions import conversions_left
from tests.fleet.conftest import Site, last_opened, opened, pid_of
from tests.fleet.test_contract import STOPPED, in_short, running


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
async def test_a_process_that_dies_is_seen_with_its_signal(local_site: Site, number: signal.Signals) -> None:
    async with last_opened(local_site) as fleet:
        await running(fleet)
        seen: list[Event] = []
        async with fleet.events("guest", last_id="0-0") as events:
            os.kill(pid_of(fleet.machine("guest")), number)
            seen = [event async for event in events if event.kind != "counters"]
        info = await fleet.wait("guest", STOPPED)
        assert info.end is not None
        assert (info.end.reason, info.end.status, info.end.signal) == ("process-died", 128 + number, number)
        assert f"signal {number:d}" in info.end.message
        assert [in_short(event) for event in seen] == ["created", "started", "stopped"]
        assert seen[-1].data["signal"] == number


async def test_the_conversions_of_a_process_that_dies_stay(local_site: Site) -> None:
    async with opened(local_site) as fleet:
        await running(fleet)
        async with fleet.events("guest", last_id="0-0") as events, fleet.console("guest") as console:
            await console.send(b"sps")
            seen: list[Event] = []
            async for event in events:
                if event.kind != "counters":
                    seen.append(event)
                if event.kind == "conversion" and event.data["sequence"] == 3:
                    break
            # Written by the same turns of its event loop, or by the ones some milliseconds later.
            while conversions_left_of(local_site) != 3:  # noqa: ASYNC110 - another process writes it, and tells nobody
                await trio.sleep(0.005)
            os.kill(pid_of(fleet.machine("guest")), signal.SIGKILL)
            await fleet.wait("guest", STOPPED)
            assert [in_short(event) async for event in events if event.kind != "counters"] == ["stopped"]
    # A daemon that was not there then knows them too.
    async with last_opened(local_site) as fleet:
        found = await fleet.conversions("guest", since=0, limit=100)
        assert [record["sequence"] for record in found] == [1, 2, 3]
        assert found[1:] == await fleet.conversions("guest", since=1, limit=100)
        assert await fleet.last_conversion("guest") == 3
        async with fleet.events("guest", last_id=seen[2].id) as events:
            assert [in_short(event) async for event in events] == [2, 3, "stopped"]
        counters = await fleet.counters("guest")
        assert sum(counters.requests.values()) == 3
        assert counters.lost == 0


def conversions_left_of(site: Site) -> int:
    with MachineFolder.open(site.path("guest")) as folder:
        left = conversions_left(folder)
        return 0 if left is None else left.count


async def test_a_crash_leaves_its_traceback(fake_site: Site) -> None:
    async with last_opened(fake_site) as fleet:
        await running(fleet)
        async with fleet.console("guest") as console:
            with suppress(MachineStateError):  # it may end before it can say that it took the key
                await console.send(b"!")
            await fleet.wait("guest", STOPPED)
        assert "Segmentation fault" in (fake_site.path("guest") / "stderr").read_text()


@pytest.mark.kvm
async def test_a_guest_that_cannot_go_on_is_told_from_a_process_that_died(kvm_site: Site) -> None:
    async with last_opened(kvm_site) as fleet:
        await running(fleet)
        async with fleet.console("guest") as console:
            await console.send(b"x")
            info = await fleet.wait("guest", STOPPED)
        assert info.end is not None
        assert (info.end.reason, info.end.status, info.end.signal) == ("triple-fault", 122, None)
