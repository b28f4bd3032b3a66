"""What a fleet offers of a Linux guest's devices: the agent, the balloon, the power button."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock

from kvmd.errors import DeviceInUse, MachineStateError, NoSuchDevice
from kvmd.fleet import local
from kvmd.fleet.base import Balloon, Console, Fleet
from kvmd.fleet.local import LocalFleet
from kvmd.guests import GUESTS
from kvmd.machine_process.client import ControlClient
from kvmd.machine_process.folder import MachineFolder
from kvmd.machine_process.framing import BadMessage
from kvmd.machine_process.messages import (
    AgentTold,
    AskInfo,
    AttachAgent,
    Attached,
    Refused,
    TellAgent,
)
from kvmd.spec import MachineSpec
from kvmd.stop import NOT_SHUT_DOWN
from kvmd.stop import STOPPED as STOPPED_BY_OPERATOR
from tests.fleet.conftest import FAKE_SPAWNER, Site, spec
from tests.fleet.test_contract import STOPPED, fleet_of, running

MEMORY = 64 << 20
SECONDS = 60.0


@pytest.fixture(params=["memory", "process"])
def site(request: pytest.FixtureRequest, tmp_path: Path, _no_process_left: None) -> Site:
    """Return a place for a fleet whose guests have every device without a kernel that drives them."""
    return Site(str(request.param), tmp_path / "state", FAKE_SPAWNER)


async def linux(fleet: Fleet, name: str = "guest", **changes: object) -> None:
    fields = {"kernel": GUESTS["echo"].path, "name": name, "memory": MEMORY, "agent": "agent", "balloon": True}
    await fleet.create(MachineSpec(**{**fields, **changes}), owner_uid=7)  # type: ignore[arg-type]
    await fleet.start(name)


@asynccontextmanager
async def attached(fleet: Fleet) -> AsyncIterator[Console]:
    """Attach to the agent as soon as whoever was there before has gone."""
    async with AsyncExitStack() as stack:
        while True:
            try:
                agent = await stack.enter_async_context(fleet.agent("guest"))
                break
            except DeviceInUse:
                await trio.lowlevel.checkpoint()
        yield agent


async def said(agent: Console, text: bytes) -> None:
    """Send something, and read the answer, however it is cut."""
    answer = b""
    whole = trio.Event()

    async def listen() -> None:
        nonlocal answer
        while True:
            answer += await agent.receive()
            if len(answer) >= len(text):
                whole.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(listen)
        await agent.send(text)
        await whole.wait()
        nursery.cancel_scope.cancel()
    assert answer == text.upper()


async def test_one_at_a_time_talks_to_the_agent_and_the_next_one_anew(site: Site) -> None:
    async with fleet_of(site) as fleet:
        await linux(fleet)
        for _ in range(2):
            async with attached(fleet) as agent:
                await said(agent, b"hello")
                await said(agent, b"x" * 100_000)
                with pytest.raises(DeviceInUse):
                    async with fleet.agent("guest"):
                        pass
        async with attached(fleet) as agent:
            await fleet.stop("guest")
            assert await agent.receive() == b""
            with pytest.raises(MachineStateError):
                await agent.send(b"anybody?")
        with pytest.raises(MachineStateError):
            async with fleet.agent("guest"):
                pass


async def test_who_gives_up_on_a_deaf_agent_lets_the_next_one_in(site: Site) -> None:
    async with fleet_of(site) as fleet:
        await linux(fleet)
        async with fleet.agent("guest") as agent, trio.open_nursery() as nursery:
            nursery.start_soon(agent.receive)
            await said_nothing(agent)
            nursery.cancel_scope.cancel()
        async with attached(fleet):
            pass


async def said_nothing(agent: Console) -> None:
    with trio.move_on_after(0.05) as waiting:
        await agent.send(b"deaf")
        await agent.send(b"hello?")
    assert waiting.cancelled_caught


async def test_the_balloon_is_told_and_asked(site: Site) -> None:
    async with fleet_of(site) as fleet:
        await linux(fleet, balloon_target=8 << 20)
        assert await fleet.balloon("guest") == Balloon(8 << 20, 4 << 20, 0, MEMORY // 4)
        assert await fleet.set_balloon("guest", 16 << 20) == Balloon(16 << 20, 8 << 20, 8 << 20, MEMORY // 4)
        assert (await fleet.balloon("guest")).target_bytes == 16 << 20
        for target in (-4096, 100, MEMORY, 1 << 62):
            with pytest.raises(ValueError, match=f"target: {target} is not"):
                await fleet.set_balloon("guest", target)
        # The counters bring it along, so that figures of all machines are one question to each.
        assert (await fleet.counters("guest")).balloon == await fleet.balloon("guest")
        await fleet.stop("guest")
        with pytest.raises(MachineStateError):
            await fleet.balloon("guest")
        assert (await fleet.counters("guest")).balloon == Balloon(16 << 20, 8 << 20, 8 << 20, 0), "it holds nothing now"


async def test_the_power_button_ends_a_guest_that_listens(site: Site) -> None:
    async with fleet_of(site) as fleet:
        await linux(fleet)
        await fleet.pause("guest")
        with pytest.raises(MachineStateError, match="needs a machine that is running"):
            await fleet.press_power_button("guest")
        await fleet.resume("guest")
        await fleet.press_power_button("guest")
        end = (await fleet.wait("guest", STOPPED)).end
        assert end is not None
        assert (end.reason, end.status) == ("guest-power-off", 0)
        with pytest.raises(MachineStateError):
            await fleet.press_power_button("guest")


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
    monkeypatch.setattr(local, "SHUTDOWN_SECONDS", 1000.0)
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
    monkeypatch.setattr(local, "SHUTDOWN_SECONDS", 1000.0)
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


async def test_a_machine_without_a_device_says_so(site: Site) -> None:
    async with fleet_of(site) as fleet:
        await running(fleet)
        with pytest.raises(NoSuchDevice, match="no port for an agent"):
            async with fleet.agent("guest"):
                pass
        assert (await fleet.counters("guest")).balloon is None
        with pytest.raises(NoSuchDevice, match="no balloon"):
            await fleet.balloon("guest")
        with pytest.raises(NoSuchDevice, match="no balloon"):
            await fleet.set_balloon("guest", 4096)
        with pytest.raises(NoSuchDevice, match="no power button"):
            await fleet.press_power_button("guest")


async def test_the_agents_connection_is_the_agents_alone(fake_site: Site) -> None:
    async with fleet_of(fake_site) as fleet:
        await linux(fleet)
        with MachineFolder.open(fake_site.path("guest")) as folder:
            async with await ControlClient.connect(folder) as client:
                with pytest.raises(BadMessage, match="no agent is attached to"):
                    await client.ask(TellAgent(b"x"), AgentTold)
                await client.ask(AttachAgent(), Attached)
                await client.send(AskInfo())
                refused = await client.receive()
                assert isinstance(refused, Refused)
                assert "the connection is the agent's" in refused.message
                assert await client.receive() is None
        async with attached(fleet) as agent:
            await said(agent, b"free again")
