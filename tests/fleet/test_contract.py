"""What every fleet does: the one in memory, the one of processes, and the one of machines on KVM."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from itertools import pairwise
from pathlib import Path

import pytest
import trio
import trio.testing

from kvmd.errors import ImageError, MachineExists, MachineStateError, UnknownMachine
from kvmd.fleet.base import Console, Event, Fleet, MachineState
from kvmd.guests import GUESTS
from kvmd.memory.accessor import PrivateMemory
from kvmd.ranges import PageState
from kvmd.units import PAGE_SIZE
from tests.fleet.conftest import Site, spec

SECONDS = 60
STOPPED: frozenset[MachineState] = frozenset({"stopped"})


@asynccontextmanager
async def fleet_of(site: Site) -> AsyncIterator[Fleet]:
    """Open a fleet, and delete all machines of it at the end of the test."""
    with trio.fail_after(SECONDS):
        async with site.open() as fleet:
            yield fleet
            for machine in fleet.machines():
                if machine.state in {"running", "paused"}:
                    await fleet.kill(machine.name)
                await fleet.delete(machine.name)


async def running(fleet: Fleet, name: str = "guest") -> None:
    await fleet.create(spec(name), owner_uid=7)
    await fleet.start(name)


async def until(console: Console, text: bytes) -> bytes:
    """Read the console until it says ``text``."""
    said = b""
    while text not in said:
        data = await console.receive()
        assert data, f"the machine ended after {said!r}"
        said += data
    return said


async def type_and_wait(fleet: Fleet, name: str, keys: bytes) -> None:
    """Type what the guest echoes, and wait for the echo."""
    async with fleet.console(name) as console:
        await until(console, b"type\n")
        await console.send(keys + b".")
        await until(console, keys + b".")


async def test_a_machine_from_its_creation_to_its_end(site: Site) -> None:
    async with fleet_of(site) as fleet:
        assert fleet.machines() == []
        created = await fleet.create(spec(vcpus=2), owner_uid=7)
        assert (created.name, created.state, created.owner_uid) == ("guest", "created", 7)
        assert created.spec == spec(vcpus=2)
        assert created.pid is not None
        assert created.facts["vcpus"] == 2
        assert (created.started_ns, created.end) == (None, None)
        assert fleet.machine("guest") == created
        started = await fleet.start("guest")
        assert started.state == "running"
        assert started.started_ns is not None
        assert started.started_ns >= started.created_ns
        async with fleet.console("guest") as console:
            await console.send(b"f")
            said = b""
            while data := await console.receive():
                said += data
            assert said == b"echo: type\nf"
        info = await fleet.wait("guest", STOPPED)
        assert (info.state, info.pid) == ("stopped", None)
        assert info.end is not None
        assert (info.end.reason, info.end.status, info.end.signal) == ("guest-exit", 3, None)
        assert info.end.wall_ns >= started.started_ns
        await fleet.delete("guest")
        assert fleet.machines() == []


async def test_pause_and_resume(site: Site) -> None:
    async with fleet_of(site) as fleet:
        await running(fleet)
        async with fleet.console("guest") as console:
            await until(console, b"type\n")
            assert (await fleet.pause("guest")).state == "paused"
            await console.send(b"a")
            with trio.move_on_after(0.05):
                pytest.fail(f"a paused guest printed {await console.receive()!r}")
            assert (await fleet.resume("guest")).state == "running"
            assert await until(console, b"a") == b"a"
        await fleet.pause("guest")
        stopped = await fleet.stop("guest")
        assert stopped.end is not None
        assert (stopped.end.reason, stopped.end.status) == ("operator", 126)


async def test_actions_say_which_state_they_need_and_which_they_found(site: Site) -> None:
    async with fleet_of(site) as fleet:
        await fleet.create(spec(), owner_uid=0)
        for action in (fleet.pause, fleet.resume, fleet.stop):
            with pytest.raises(MachineStateError, match="this one is created"):
                await action("guest")
        await fleet.start("guest")
        for action in (fleet.start, fleet.resume):
            with pytest.raises(MachineStateError, match="this one is running"):
                await action("guest")
        with pytest.raises(MachineStateError, match="this one is running"):
            await fleet.delete("guest")
        await fleet.pause("guest")
        for action in (fleet.start, fleet.pause):
            with pytest.raises(MachineStateError, match="this one is paused"):
                await action("guest")
        await fleet.kill("guest")
        for action in (fleet.start, fleet.pause, fleet.resume, fleet.stop, fleet.kill):
            with pytest.raises(MachineStateError, match="this one is stopped"):
                await action("guest")


async def test_a_killed_machine_says_so(site: Site) -> None:
    async with fleet_of(site) as fleet:
        await running(fleet)
        info = await fleet.kill("guest")
        assert info.state == "stopped"
        assert info.end is not None
        assert (info.end.reason, info.end.status, info.end.signal) == ("killed", 127, 9)


async def test_nothing_is_known_of_a_machine_that_is_not_there(site: Site) -> None:
    async with fleet_of(site) as fleet:
        with pytest.raises(UnknownMachine):
            fleet.machine("nobody")
        for action in (fleet.start, fleet.pause, fleet.resume, fleet.stop, fleet.kill, fleet.delete):
            with pytest.raises(UnknownMachine):
                await action("nobody")
        with pytest.raises(UnknownMachine):
            await fleet.wait("nobody", STOPPED)
        with pytest.raises(UnknownMachine):
            await fleet.counters("nobody")
        with pytest.raises(UnknownMachine):
            await fleet.memory_map("nobody")
        with pytest.raises(UnknownMachine):
            await fleet.read_memory("nobody", 0, 1)
        with pytest.raises(UnknownMachine):
            await fleet.conversions("nobody", since=0, limit=1)
        for stream in (
            fleet.events("nobody", last_id=None),
            fleet.console("nobody"),
            fleet.console_output("nobody"),
            fleet.log_output("nobody"),
        ):
            with pytest.raises(UnknownMachine):
                async with stream:
                    pass


async def test_a_name_is_taken_once(site: Site) -> None:
    async with fleet_of(site) as fleet:
        won: list[str] = []
        lost: list[str] = []

        async def create() -> None:
            try:
                won.append((await fleet.create(spec(), owner_uid=0)).name)
            except MachineExists as error:
                lost.append(str(error))

        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(create)
        assert won == ["guest"]
        assert len(lost) == 3
        names = [(await fleet.create(spec(), owner_uid=0, any_name=True)).name for _ in range(2)]
        assert names == ["guest-2", "guest-3"]
        assert [machine.name for machine in fleet.machines()] == ["guest", "guest-2", "guest-3"]
        assert fleet.machine("guest-2").spec.name == "guest-2"


async def test_one_of_many_actions_wins(site: Site) -> None:
    async with fleet_of(site) as fleet:
        await fleet.create(spec(), owner_uid=0)
        won = 0

        async def start() -> None:
            nonlocal won
            try:
                await fleet.start("guest")
                won += 1
            except MachineStateError:
                pass

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(start)
        assert won == 1


async def test_two_who_stop_see_the_same_end(site: Site) -> None:
    async with fleet_of(site) as fleet:
        await running(fleet)
        ends = []

        async def stop() -> None:
            try:
                ends.append((await fleet.stop("guest")).end)
            except MachineStateError as error:
                assert error.found == "stopped"  # noqa: PT017 - the rest is asserted below

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(stop)
        assert ends
        assert set(ends) == {fleet.machine("guest").end}


async def test_a_machine_that_cannot_be_made_leaves_nothing(site: Site) -> None:
    async with fleet_of(site) as fleet:
        with pytest.raises(ImageError, match="/nowhere: No such file"):
            await fleet.create(spec(image=Path("/nowhere")), owner_uid=0)
        assert fleet.machines() == []
        await fleet.create(spec(), owner_uid=0)


async def test_an_open_image_needs_no_path(site: Site) -> None:
    image = os.open(GUESTS["echo"].path, os.O_RDONLY)
    try:
        async with fleet_of(site) as fleet:
            await fleet.create(spec(image=Path("/nowhere/echo.elf")), owner_uid=0, files=[image])
            await fleet.start("guest")
            await type_and_wait(fleet, "guest", b"a")
            assert fleet.machine("guest").spec.image == Path("/nowhere/echo.elf")
    finally:
        os.close(image)


async def test_waiting_ends_with_the_state_or_with_the_machine(site: Site) -> None:
    async with fleet_of(site) as fleet:
        await fleet.create(spec(), owner_uid=0)
        assert (await fleet.wait("guest", frozenset({"created", "running"}))).state == "created"
        unknown = trio.Event()

        async def wait() -> None:
            with suppress(UnknownMachine):
                await fleet.wait("guest", STOPPED)
            unknown.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            await fleet.delete("guest")
            await unknown.wait()


async def test_the_memory_of_a_machine(site: Site) -> None:
    async with fleet_of(site) as fleet:
        await running(fleet)
        await type_and_wait(fleet, "guest", b"s")
        ranges = (await fleet.memory_map("guest")).ranges
        assert ranges[0][0].start == 0
        assert ranges[-1][0].end == 4 << 20
        assert all(one.end == other.start for (one, _), (other, _) in pairwise(ranges))
        ((shared, _),) = [item for item in ranges if item[1] is PageState.SHARED]
        assert shared.size_bytes == 4096
        assert len(await fleet.read_memory("guest", shared.start, 4096)) == 4096
        with pytest.raises(PrivateMemory):
            await fleet.read_memory("guest", shared.start, 4097)
        for gpa, size_bytes in ((-1, 1), (0, 0), (4 << 20, 1), (0, (4 << 20) + 1)):
            with pytest.raises(ValueError, match="memory"):
                await fleet.read_memory("guest", gpa, size_bytes)
        counters = await fleet.counters("guest")
        assert counters.requests == {("implicit", "shared", "converted"): 1}
        assert (counters.shared_bytes, counters.private_bytes) == (4096, (4 << 20) - 4096)
        await fleet.stop("guest")
        assert (await fleet.counters("guest")).requests == counters.requests
        with pytest.raises(MachineStateError, match="this one is stopped"):
            await fleet.memory_map("guest")


async def test_recent_conversions_before_and_after_the_end(site: Site) -> None:
    async with fleet_of(site) as fleet:
        await running(fleet)
        await type_and_wait(fleet, "guest", b"spsps")
        for _ in range(2):
            found = await fleet.conversions("guest", since=0, limit=100)
            assert [record["sequence"] for record in found] == [1, 2, 3, 4, 5]
            assert [record["to"] for record in found] == ["shared", "private", "shared", "private", "shared"]
            assert all(record["machine"] == "guest" for record in found)
            assert await fleet.conversions("guest", since=1, limit=2) == found[1:3]
            assert await fleet.conversions("guest", since=5, limit=2) == []
            assert await fleet.conversions("guest", since=99, limit=2) == []
            if fleet.machine("guest").state == "running":
                await fleet.stop("guest")


def in_short(event: Event) -> object:
    return event.data["change"] if event.kind == "lifecycle" else event.data["sequence"]


async def test_a_machine_s_events_and_coming_back_to_any_of_them(site: Site) -> None:
    async with fleet_of(site) as fleet:
        await fleet.create(spec(), owner_uid=0)
        seen: list[Event] = []
        async with fleet.events("guest", last_id=None) as events:
            await fleet.start("guest")
            await type_and_wait(fleet, "guest", b"sp")
            await fleet.pause("guest")
            await fleet.resume("guest")
            await fleet.stop("guest")
            seen = [event async for event in events if event.kind != "counters"]
        assert [in_short(event) for event in seen] == ["started", 1, 2, "paused", "resumed", "stopped"]
        assert seen[-1].data["reason"] == "operator"
        assert all(event.machine == "guest" for event in seen)
        assert len({event.id for event in seen}) == len(seen)
        for number, event in enumerate(seen):
            async with fleet.events("guest", last_id=event.id) as events:
                again = [event async for event in events if event.kind != "counters"]
            assert again == seen[number + 1 :]


async def test_an_id_that_never_was_is_refused(site: Site) -> None:
    async with fleet_of(site) as fleet:
        await fleet.create(spec(), owner_uid=0)
        for last_id in ("", "x", "-1", "1-", "0x1-2", "all~1.2", "\0", "9" * 100):
            with pytest.raises(ValueError, match="never"):
                async with fleet.events("guest", last_id=last_id):
                    pass


async def test_the_events_of_all_machines(site: Site) -> None:
    async with fleet_of(site) as fleet:
        await running(fleet, "one")
        seen: list[Event] = []
        async with fleet.events(None, last_id=None) as events:
            await running(fleet, "two")
            await type_and_wait(fleet, "two", b"s")
            await type_and_wait(fleet, "one", b"s")
            await fleet.stop("one")
            await fleet.stop("two")
            async for event in events:
                if event.kind != "counters":
                    seen.append(event)
                if sum(in_short(event) == "stopped" for event in seen) == 2:
                    break
        found = {name: [in_short(event) for event in seen if event.machine == name] for name in ("one", "two")}
        assert found == {"one": [1, "stopped"], "two": ["created", "started", 1, "stopped"]}
        async with fleet.events(None, last_id=seen[0].id) as events:
            again: list[Event] = []
            async for event in events:
                if event.kind != "counters":
                    again.append(event)
                if sum(in_short(event) == "stopped" for event in again) == 2:
                    break
        for name in ("one", "two"):
            assert [in_short(event) for event in again if event.machine == name] == [
                in_short(event) for event in seen[1:] if event.machine == name
            ]


async def test_a_console_takes_input_before_the_start(site: Site) -> None:
    async with fleet_of(site) as fleet:
        await fleet.create(spec(), owner_uid=0)
        async with fleet.console("guest") as console:
            await console.send(b"ab")
            await fleet.start("guest")
            assert await until(console, b"ab") == b"echo: type\nab"


@pytest.mark.parametrize("ended", [False, True])
async def test_output_is_read_from_any_place_and_to_what_there_is(site: Site, ended: bool) -> None:  # noqa: FBT001 - a case
    whole = b"echo: type\nab."
    async with fleet_of(site) as fleet:
        await running(fleet)
        await type_and_wait(fleet, "guest", b"ab")
        if ended:
            await fleet.stop("guest")
        for start in (0, 5, len(whole) - 1, len(whole), 10**15):
            async with fleet.console_output("guest", start=start, follow=False) as output:
                parts = [part async for part in output]
            assert b"".join(part.data for part in parts) == whole[start:]
            assert [part.start for part in parts[:1]] == ([start] if start < len(whole) else [])
            assert not any(part.dropped for part in parts)
        async with fleet.log_output("guest", follow=False) as log:
            assert all(part.data for part in [part async for part in log])


async def test_the_last_conversion_and_what_is_hottest(site: Site) -> None:
    async with fleet_of(site) as fleet:
        await running(fleet)
        assert await fleet.last_conversion("guest") == 0
        await type_and_wait(fleet, "guest", b"spsps")
        for _ in range(2):
            assert await fleet.last_conversion("guest") == 5
            hottest = (await fleet.counters("guest")).hottest
            assert [hot.count for hot in hottest] == [2, 2, 1]
            assert all(hot.size_bytes == PAGE_SIZE and not hot.overcount for hot in hottest)
            if fleet.machine("guest").state == "running":
                await fleet.stop("guest")


async def test_a_reader_that_has_seen_nothing_has_a_place_to_come_back_to(site: Site) -> None:
    async with fleet_of(site) as fleet:
        await running(fleet)
        for name in ("guest", None):
            async with fleet.events(name, last_id=None) as events:
                place = events.place
            assert place is not None
            await type_and_wait(fleet, "guest", b"s")
            async with fleet.events(name, last_id=place) as events:
                async for event in events:
                    if event.kind != "counters":
                        break
                assert event.kind == "conversion"
                assert events.place == event.id
        assert event.data["sequence"] == 2


async def test_an_id_from_the_future_is_refused(site: Site) -> None:
    # Such as that of another machine which had the name before.
    async with fleet_of(site) as fleet:
        await running(fleet)
        async with fleet.events("guest", last_id=None) as events:
            assert events.place is not None
            ahead = "-".join(str(int(part) + 1000) for part in events.place.split("-"))
        for _ in range(2):
            with pytest.raises(ValueError, match="never"):
                async with fleet.events("guest", last_id=ahead):
                    pass
            if fleet.machine("guest").state == "running":
                await fleet.stop("guest")


async def test_output_is_followed_from_the_beginning_to_the_end(site: Site) -> None:
    async with fleet_of(site) as fleet:
        await running(fleet)
        await type_and_wait(fleet, "guest", b"ab")
        async with fleet.console_output("guest") as output, fleet.log_output("guest") as log:
            await fleet.stop("guest")
            assert b"".join([part.data async for part in output]) == b"echo: type\nab."
            assert b"guest" in b"".join([part.data async for part in log])
        async with fleet.console_output("guest") as output:
            assert b"".join([part.data async for part in output]) == b"echo: type\nab."
        with pytest.raises(MachineStateError, match="this one is stopped"):
            async with fleet.console("guest") as console:
                await console.send(b"a")
