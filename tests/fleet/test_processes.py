"""Machines as processes: violent ends, a daemon that goes and comes back, a folder full of garbage, a full disk."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
import structlog
import trio
from trio.testing import MockClock

from kvmd.errors import HostError, MachineExists, MachineStateError
from kvmd.fleet.base import Event, MachineInfo
from kvmd.fleet.local import LocalFleet
from kvmd.machine_process.client import ControlClient
from kvmd.machine_process.folder import MachineFolder
from kvmd.machine_process.kept_conversions import conversions_left
from kvmd.machine_process.messages import FollowEvents, Type, Typed
from tests.fleet.conftest import FAKE_SPAWNER, Site, parent_of, spec
from tests.fleet.test_contract import STOPPED, in_short, running, until

SECONDS = 90
DEADLINE_SECONDS = 10.0
"""Less than a machine has to answer, so that it is not given up for its silence first."""


@pytest.fixture(params=["fake", pytest.param("kvm", marks=pytest.mark.kvm)])
def local_site(request: pytest.FixtureRequest) -> Site:
    """Return a place for fleets of real processes, with fake machines and on KVM."""
    site = request.getfixturevalue(f"{request.param}_site")
    assert isinstance(site, Site)
    return site


@asynccontextmanager
async def opened(site: Site) -> AsyncIterator[LocalFleet]:
    """Open a fleet; its machines go on when it is closed."""
    with trio.fail_after(SECONDS):
        async with site.open_local() as fleet:
            yield fleet


@asynccontextmanager
async def last_opened(site: Site) -> AsyncIterator[LocalFleet]:
    """Open a fleet, and end and delete all of its machines after it."""
    async with opened(site) as fleet:
        yield fleet
        await fleet.stop_all(0)
        for machine in fleet.machines():
            await fleet.delete(machine.name)


def pid_of(info: MachineInfo) -> int:
    assert info.pid is not None
    return info.pid


async def gone(pidfd: int) -> None:
    """Wait for a process to end."""
    with trio.fail_after(SECONDS):
        await trio.lowlevel.wait_readable(pidfd)
    os.close(pidfd)


async def console_of(fleet: LocalFleet, name: str = "guest") -> bytes:
    """Return all that a stopped machine printed."""
    async with fleet.console_output(name) as output:
        return b"".join([part.data async for part in output])


# -- violent ends --------------------------------------------------------------------------------------------


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


async def test_sigterm_stops_a_machine_in_order(local_site: Site) -> None:
    async with last_opened(local_site) as fleet:
        for name, starts in (("running", True), ("created", False)):
            await fleet.create(spec(name), owner_uid=0)
            if starts:
                await fleet.start(name)
            os.kill(pid_of(fleet.machine(name)), signal.SIGTERM)
            info = await fleet.wait(name, STOPPED)
            assert info.end is not None
            assert (info.end.reason, info.end.signal) == ("operator", None)


async def test_a_spawner_that_dies_is_replaced(fake_site: Site) -> None:
    async with last_opened(fake_site) as fleet:
        first = await fleet.create(spec("first"), owner_uid=0)
        os.kill(parent_of(pid_of(first)), signal.SIGKILL)
        with trio.fail_after(SECONDS):
            while True:
                try:
                    await fleet.create(spec("second"), owner_uid=0)
                    break
                except HostError:  # the one that was asked died
                    continue
        assert (await fleet.start("first")).state == "running"


# -- the daemon goes and comes back --------------------------------------------------------------------------


async def test_machines_outlive_the_fleet_and_are_found_again(local_site: Site) -> None:
    async with opened(local_site) as fleet:
        before = {}
        for name in ("created", "running", "paused"):
            before[name] = await fleet.create(spec(name), owner_uid=5)
        for name in ("running", "paused"):
            before[name] = await fleet.start(name)
        before["paused"] = await fleet.pause("paused")
    async with last_opened(local_site) as fleet:
        assert {machine.name: machine for machine in fleet.machines()} == before
        assert (await fleet.start("created")).state == "running"
        assert (await fleet.resume("paused")).state == "running"
        assert (await fleet.stop("running")).state == "stopped"
        with pytest.raises(MachineExists):
            await fleet.create(spec("paused"), owner_uid=0)


async def test_nothing_is_lost_while_the_daemon_is_away(local_site: Site) -> None:
    async with opened(local_site) as fleet:
        await running(fleet)
        async with fleet.events("guest", last_id="0-0") as events, fleet.console("guest") as console:
            await console.send(b"sps")
            await until(console, b"sps")
            seen: list[Event] = []
            async for event in events:
                if event.kind != "counters":
                    seen.append(event)
                if event.kind == "conversion" and event.data["sequence"] == 3:
                    break
    # Nobody is there: somebody types all the same, and the guest ends with 3.
    with MachineFolder.open(local_site.path("guest")) as folder, trio.fail_after(SECONDS):
        async with await ControlClient.connect(folder) as client:
            await client.send(FollowEvents(0, 0))
            pid = client.greeting.pid
            async with await ControlClient.connect(folder) as typing:
                await typing.ask(Type(b"pspsf"), Typed)
            while await client.receive() is not None:
                pass
    with suppress(ProcessLookupError):
        await gone(os.pidfd_open(pid))
    async with last_opened(local_site) as fleet:
        info = fleet.machine("guest")
        assert info.state == "stopped"
        assert info.end is not None
        assert (info.end.reason, info.end.status) == ("guest-exit", 3)
        assert info.facts["vcpus"] == 1
        assert info.started_ns is not None
        async with fleet.events("guest", last_id=seen[-1].id) as events:
            seen += [event async for event in events if event.kind != "counters"]
        assert [in_short(event) for event in seen] == ["created", "started", 1, 2, 3, 4, 5, 6, 7, "stopped"]
        assert await console_of(fleet) == b"echo: type\nspspspsf"
        found = await fleet.conversions("guest", since=0, limit=100)
        assert [record["sequence"] for record in found] == [1, 2, 3, 4, 5, 6, 7]
        assert sum((await fleet.counters("guest")).requests.values()) == 7
        async with fleet.log_output("guest") as log:
            lines = b"".join([part.data async for part in log]).splitlines()
        names = [json.loads(line)["event"] for line in lines]
        assert names[0] == ("machine-starting" if local_site.kind == "kvm" else "conversion")
        assert names[-1] == "machine-stopped"


async def test_a_death_while_the_daemon_is_away_is_told_by_the_parent(fake_site: Site) -> None:
    async with opened(fake_site) as fleet:
        await running(fleet)
        pid = pid_of(fleet.machine("guest"))
    pidfd = os.pidfd_open(pid)
    os.kill(pid, signal.SIGSEGV)
    await gone(pidfd)
    exit_file = fake_site.path("guest") / "exit.json"
    with trio.fail_after(SECONDS):
        while not exit_file.exists():  # noqa: ASYNC110 - the parent writes it, and tells nobody
            await trio.sleep(0.005)
    async with last_opened(fake_site) as fleet:
        end = fleet.machine("guest").end
        assert end is not None
        assert (end.reason, end.signal) == ("process-died", signal.SIGSEGV)


async def test_a_second_fleet_on_the_same_folder_is_refused(fake_site: Site) -> None:
    async with opened(fake_site) as fleet:
        with pytest.raises(HostError, match=rf"another daemon \(process {os.getpid()}\) uses the state folder"):
            async with fake_site.open_local():
                pass
        assert fleet.machines() == []
    async with opened(fake_site):
        pass


def copies_of(path: Path) -> list[int]:
    """Return copies of this process's descriptors of a file."""
    found = [fd for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink() and fd.readlink() == path]
    return [os.dup(int(fd.name)) for fd in found]


async def test_a_copy_of_the_lock_s_descriptor_keeps_nobody_out(fake_site: Site) -> None:
    # A child that is forked, and not yet at its exec, has one: of a process that is started while the daemon ends.
    async with opened(fake_site):
        held = copies_of(fake_site.folder / "lock")
    try:
        assert held
        async with opened(fake_site):
            pass
    finally:
        for fd in held:
            os.close(fd)


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


_DAEMON = """
import sys, trio
from functools import partial
from pathlib import Path
from kvmd.fleet.local import open_fleet
from tests.fleet.conftest import spec

async def main():
    async with open_fleet(Path(sys.argv[1]), spawner=sys.argv[2:]) as fleet:
        await fleet.create(spec(), owner_uid=0)
        await fleet.start("guest")
        print("ready", flush=True)
        await trio.sleep_forever()

trio.run(main)
"""


async def test_a_daemon_that_is_killed_leaves_its_machines_running(local_site: Site) -> None:
    with subprocess.Popen(  # noqa: ASYNC220, S603 - at once; our own interpreter
        [sys.executable, "-c", _DAEMON, str(local_site.folder), *local_site.spawner],
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as daemon:
        assert daemon.stdout is not None
        while not (line := daemon.stdout.readline()).startswith(b"ready"):
            assert line, "the daemon ended"
        # All that belongs to it: what a terminal that hangs up, or a careless service manager, would do.
        os.killpg(daemon.pid, signal.SIGKILL)
    async with last_opened(local_site) as fleet:
        assert fleet.machine("guest").state == "running"
        async with fleet.console("guest") as console:
            await console.send(b"f")
            assert (await until(console, b"f")) == b"echo: type\nf"
        end = (await fleet.wait("guest", STOPPED)).end
        assert end is not None
        assert end.status == 3


@pytest.mark.parametrize("turns", [0, 1, 2, 4, 8, 16, 32])
async def test_a_creation_that_is_given_up_leaves_nothing(fake_site: Site, turns: int) -> None:
    async with last_opened(fake_site) as fleet:
        await fleet.create(spec("first"), owner_uid=0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(fleet.create, spec(), owner_uid=0))
            for _ in range(turns):
                await trio.sleep(0.001)
            nursery.cancel_scope.cancel()
        names = [machine.name for machine in fleet.machines()]
        assert names == sorted(path.name for path in (fake_site.folder / "machines").iterdir())
        if "guest" not in names:
            await fleet.create(spec(), owner_uid=0)
        assert (await fleet.start("guest")).state == "running"


# -- what may be found in a state folder ---------------------------------------------------------------------


async def test_garbage_in_the_state_folder_is_named_and_bearable(fake_site: Site) -> None:
    machines = fake_site.folder / "machines"
    async with opened(fake_site) as fleet:
        await running(fleet, "alive")
        await running(fleet, "alive-without-file")
    (machines / "alive-without-file" / "machine.json").write_text('{"spec": {"image": ')
    (machines / "empty").mkdir()
    (machines / "not json").mkdir()
    (machines / "half").mkdir()
    (machines / "half" / "machine.json").write_text('{"spec": {"image": "/x", "na')
    (machines / "half" / "end.json.new").write_text("{")
    (machines / "nonsense").mkdir()
    (machines / "nonsense" / "machine.json").write_bytes(b"\xff\0\xfe" * 100)
    (machines / "other-name").mkdir()
    about = json.loads((machines / "alive" / "machine.json").read_text())
    (machines / "other-name" / "machine.json").write_text(json.dumps(about))
    about["spec"]["name"] = "dead"
    (machines / "dead").mkdir()
    (machines / "dead" / "machine.json").write_text(json.dumps(about))
    (machines / "dead" / "process.json").write_text('{"pid": 1, "start_ticks": 7, "boot_id": "x"}')
    (machines / "dead" / "lifecycle-00000000000000000000").write_bytes(b'{"number":1,"wall_ns":1,"cha')
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(machines / "dead" / "control"))
    about["spec"]["vcpus"] = "many"
    about["spec"]["name"] = "bad-spec"
    (machines / "bad-spec").mkdir()
    (machines / "bad-spec" / "machine.json").write_text(json.dumps(about))
    (machines / "bad-spec" / "end.json").write_text("[]")
    (machines / "a-file").write_text("hello")
    (machines / "a-link").symlink_to(machines / "alive")
    (machines / "UPPER").mkdir()
    (fake_site.folder / ".removed-x-1").mkdir()
    with structlog.testing.capture_logs() as log:
        async with last_opened(fake_site) as fleet:
            states = {machine.name: machine.state for machine in fleet.machines()}
            assert states == {"alive": "running", "alive-without-file": "running", "dead": "stopped"}
            end = fleet.machine("dead").end
            assert end is not None
            assert end.reason == "process-died"
            # A name whose folder was of no use is free again.
            await fleet.create(spec("half"), owner_uid=0)
            with pytest.raises(MachineExists, match="in the state folder"):
                await fleet.create(spec("a-file"), owner_uid=0)
    told = {(entry["event"], entry.get("machine", Path(str(entry.get("path", ""))).name)) for entry in log}
    for name in ("empty", "half", "nonsense", "other-name", "bad-spec"):
        assert ("machine-folder-unusable", name) in told
    for name in ("a-file", "a-link", "UPPER", "not json"):
        assert ("stranger-in-state-folder", name) in told
    assert ("machine-had-ended", "dead") in told
    assert len(list((fake_site.folder / "broken").iterdir())) == 5
    assert not list(fake_site.folder.glob(".removed-*"))


async def test_a_process_with_another_s_number_is_left_alone(fake_site: Site) -> None:
    async with opened(fake_site) as fleet:
        await running(fleet)
        pid = pid_of(fleet.machine("guest"))
        await fleet.kill("guest")
    path = fake_site.path("guest")
    (path / "end.json").unlink()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:  # noqa: ASYNC220 - at once
        process = json.loads((path / "process.json").read_text())
        (path / "process.json").write_text(json.dumps({**process, "pid": other.pid}))
        async with last_opened(fake_site) as fleet:
            assert fleet.machine("guest").state == "stopped"
            with pytest.raises(MachineStateError):
                await fleet.kill("guest")
        assert other.poll() is None
        other.communicate(b"\n")
    assert other.pid != pid


# -- many, slow and full -------------------------------------------------------------------------------------


async def test_twenty_machines_at_once(local_site: Site) -> None:
    names = [f"machine-{number}" for number in range(20)]
    async with last_opened(local_site) as fleet:
        async with trio.open_nursery() as nursery:
            for name in names:
                nursery.start_soon(_live_and_die, fleet, name)
        ends = {machine.name: machine.end.status for machine in fleet.machines() if machine.end}
        assert ends == dict.fromkeys(names, 0)


async def _live_and_die(fleet: LocalFleet, name: str) -> None:
    await fleet.create(spec(name), owner_uid=0)
    await fleet.start(name)
    async with fleet.console(name) as console:
        await until(console, b"type\n")
        await console.send(b"spq")
        await fleet.wait(name, STOPPED)


async def test_readers_that_do_not_read_hold_up_nothing(local_site: Site) -> None:
    async with last_opened(local_site) as fleet:
        await running(fleet)
        async with fleet.console("guest") as console, fleet.events("guest", last_id=None) as stalled:
            await until(console, b"type\n")
            await console.send(b"c")
            # More than the ring holds, and than sockets between take.
            with trio.fail_after(SECONDS):
                async with fleet.events("guest", last_id=None) as events:
                    async for event in events:
                        if event.kind == "conversion" and int(str(event.data["sequence"])) >= 3000:
                            break
            with trio.fail_after(SECONDS):
                await fleet.pause("guest")
                await fleet.resume("guest")
            await console.send(b"q")
            await fleet.wait("guest", STOPPED)
            numbers = []
            lost = 0
            async for event in stalled:
                if event.kind == "conversion":
                    numbers.append(int(str(event.data["sequence"])))
                elif event.kind == "lost":
                    lost += int(str(event.data["lost"]))
        total = sum((await fleet.counters("guest")).requests.values())
        assert numbers == sorted(set(numbers))
        assert len(numbers) + lost == total


@pytest.mark.usefixtures("_no_process_left")
async def test_a_disk_that_is_full_costs_files_and_no_machine(tmp_path: Path) -> None:
    # A parent that may write no file beyond a few KiB stands for the disk: write(2) then fails half-way.
    spawner = (
        "/bin/sh",
        "-c",
        f"trap '' XFSZ; ulimit -f 4; exec {FAKE_SPAWNER[0]} {FAKE_SPAWNER[1]} $0",
    )
    site = Site("process", tmp_path / "state", spawner)
    text = b"0123456789ABDEG." * 256
    async with last_opened(site) as fleet:
        await running(fleet)
        async with fleet.console("guest") as console:
            await until(console, b"type\n")
            await console.send(text)
            said = b""
            while len(said) < len(text):
                said += await console.receive()
            assert said == text
            async with fleet.console_output("guest") as output:
                again = b""
                async for part in output:
                    again += part.data
                    if len(again) >= len(b"echo: type\n" + text):
                        break
            assert again == b"echo: type\n" + text
            await console.send(b"q")
            info = await fleet.wait("guest", STOPPED)
        assert info.end is not None
        assert info.end.status == 0


async def test_a_state_folder_on_a_full_disk_is_an_error_of_the_host(fake_site: Site) -> None:
    async with opened(fake_site) as fleet:
        machines = fake_site.folder / "machines"
        machines.rename(fake_site.folder / "away")
        with pytest.raises(HostError, match="cannot make a folder"):
            await fleet.create(spec(), owner_uid=0)
        (fake_site.folder / "away").rename(machines)
        assert fleet.machines() == []
