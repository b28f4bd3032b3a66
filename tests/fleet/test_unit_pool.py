"""Machines in units of their own: real processes, fake machines and a fake systemd. The real one: tests/lab."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import msgspec
import pytest
import structlog
import trio

from kvmd import __version__
from kvmd.errors import ConfigError, HostError, ImageError
from kvmd.fleet.local import LocalFleet, open_fleet
from kvmd.fleet.unit_pool import UnitPool
from kvmd.machine_process.spawning import Waiting
from kvmd.spec.limits import LimitsSpec
from tests.fleet.conftest import Site, last_opened, pid_of, spec
from tests.fleet.fake_units import FakeUnits
from tests.fleet.test_contract import STOPPED, running

SECONDS = 90


@pytest.fixture
def units(tmp_path: Path, _no_process_left: None) -> Iterator[FakeUnits]:
    """Systemd's units, whose processes are collected."""
    made = FakeUnits(tmp_path / "machines.sock")
    yield made
    for process in made.processes.values():
        process.wait(SECONDS)


@asynccontextmanager
async def opened(units: FakeUnits, spare: int = 1) -> AsyncIterator[LocalFleet]:
    """Open a fleet whose machines are in units; they go on when it is closed."""
    state = units.path.with_name("state")
    with trio.fail_after(SECONDS):
        async with open_fleet(state, pool=UnitPool(units, units.path, spare), units=units) as fleet:
            yield fleet


@asynccontextmanager
async def ended(units: FakeUnits, spare: int = 1) -> AsyncIterator[LocalFleet]:
    """The same, and end and delete all machines after it."""
    async with opened(units, spare) as fleet:
        yield fleet
        await fleet.stop_all(0)
        for machine in fleet.machines():
            await fleet.delete(machine.name)


async def until(holds: Callable[[], bool]) -> None:
    while not holds():  # noqa: ASYNC110 - what processes do sets no event
        await trio.sleep(0.01)


@pytest.mark.parametrize("spare", [0, 1, 3])
async def test_a_machine_is_made_of_a_process_that_waits(units: FakeUnits, spare: int) -> None:
    async with ended(units, spare) as fleet:
        await until(lambda: len(units.started) >= spare)
        limits = LimitsSpec(memory=96 << 20, tasks=32)
        info = await fleet.create(spec("one", limits=limits), owner_uid=0)
        number = units.number_of(pid_of(info))
        assert number is not None
        assert units.limited == {number: limits}
        await fleet.start("one")
        assert fleet.machine("one").state == "running"
        # Another takes its place.
        await until(lambda: len(units.started) >= spare + bool(spare))
        await fleet.stop("one")
        await until(lambda: number in units.cleared)
        pool = fleet._parent
        assert isinstance(pool, UnitPool)
        await until(lambda: pool.waiting == spare)
        assert units.processes[number].wait() == 0, "its end is written down: the unit has not failed"
    assert all(process.wait(SECONDS) == 0 for process in units.processes.values())


async def test_many_at_once_get_one_each(units: FakeUnits) -> None:
    async with ended(units) as fleet:
        async with trio.open_nursery() as nursery:
            for index in range(6):
                nursery.start_soon(lambda name: fleet.create(spec(name), owner_uid=0), f"m{index}")
        assert len({machine.pid for machine in fleet.machines()}) == 6


async def test_machines_outlive_the_fleet_and_those_that_wait_end_with_it(units: FakeUnits) -> None:
    async with opened(units) as fleet:
        await running(fleet)
        was = fleet.machine("guest")
        await until(lambda: len(units.started) == 2)
        pool = fleet._parent
        assert isinstance(pool, UnitPool)
        await until(lambda: pool.waiting == 1)
    waited = next(process for process in units.processes.values() if process.pid != was.pid)
    assert await trio.to_thread.run_sync(waited.wait, SECONDS) == 0
    async with ended(units) as fleet:
        assert fleet.machine("guest") == was
        # Its number is not used for another one.
        number = units.number_of(pid_of(was))
        assert number is not None
        await fleet.create(spec("other"), owner_uid=0)
        assert units.started.count(number) == 1


@pytest.mark.parametrize(
    ("result", "reason", "message"),
    [
        ("signal", "process-died", "its process was ended by signal 9"),
        (
            "oom-kill",
            "out-of-memory",
            "the kernel ended its process for want of memory: limits.memory is 96 MiB",
        ),
        ("watchdog", "process-died", "its process was ended by systemd, since its event loop stood still"),
    ],
)
@pytest.mark.parametrize("away", [False, True])
async def test_a_violent_end_is_told_with_what_systemd_knows(
    units: FakeUnits, *, away: bool, result: str, reason: str, message: str
) -> None:
    units.result = result
    async with opened(units, 0) as fleet:
        pid = pid_of(await fleet.create(spec("guest", limits=LimitsSpec(memory=96 << 20)), owner_uid=0))
        await fleet.start("guest")
        if not away:
            os.kill(pid, signal.SIGKILL)
            await fleet.wait("guest", STOPPED)
    if away:
        os.kill(pid, signal.SIGKILL)
        units.processes[1].wait()
    async with ended(units, 0) as fleet:
        end = fleet.machine("guest").end
        assert end is not None
        assert (end.reason, end.message, end.status, end.signal) == (reason, message, 137, 9)
        await until(lambda: units.cleared != [])


async def test_one_that_cannot_be_made_leaves_nothing(units: FakeUnits, tmp_path: Path) -> None:
    async with ended(units) as fleet:
        with pytest.raises(ImageError, match="cannot read the image"):
            await fleet.create(spec(image=tmp_path / "none.elf"), owner_uid=0)
        units.unlimited = "this host does not enforce limits.cpus"
        with pytest.raises(HostError, match=r"does not enforce limits\.cpus"):
            await fleet.create(spec(limits=LimitsSpec(cpus=1.0)), owner_uid=0)
        units.unlimited = ""
        assert fleet.machines() == []
        await until(lambda: len(units.cleared) == 2)
        await fleet.create(spec(), owner_uid=0)


async def test_units_that_do_not_start_are_told_and_tried_again(units: FakeUnits) -> None:
    units.problem = "cannot start kvmd-machine@1.service: Access denied"
    async with ended(units, 0) as fleet:
        with pytest.raises(HostError, match="Access denied"):
            await fleet.create(spec(), owner_uid=0)
        units.problem = ""
        await fleet.create(spec(), owner_uid=0)


async def test_one_that_ends_while_it_waits_is_not_used(units: FakeUnits) -> None:
    with structlog.testing.capture_logs() as logs:
        async with ended(units) as fleet:
            first = pid_of(await fleet.create(spec("first"), owner_uid=0))
            await until(lambda: len(units.started) == 2)
            pool = fleet._parent
            assert isinstance(pool, UnitPool)
            await until(lambda: pool.waiting == 1)
            next(process for process in units.processes.values() if process.pid != first).kill()
            await until(lambda: pool.waiting == 0)
            await fleet.create(spec("second"), owner_uid=0)
    assert [line["event"] for line in logs].count("waiting-process-ended") == 1


async def test_fewer_wait_where_the_configuration_says_so(units: FakeUnits) -> None:
    async with ended(units, 3) as fleet:
        pool = fleet._parent
        assert isinstance(pool, UnitPool)
        await until(lambda: pool.waiting == 3)
        pool.set_spare(1)
        assert pool.waiting == 1
        await until(lambda: len(units.cleared) == 2)


@pytest.mark.parametrize("said", [b"nonsense", msgspec.msgpack.encode(Waiting("0.0"))])
async def test_strangers_are_refused(units: FakeUnits, said: bytes) -> None:
    """Of an unknown process, and of one that says something else, or is another version."""
    with structlog.testing.capture_logs() as logs:
        async with opened(units, 0):
            for number in (None, 5):
                units.number_of = lambda _, number=number: number  # type: ignore[method-assign, misc]  # a fake of a fake
                with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
                    stranger.connect(str(units.path))
                    stranger.send(said)
                    stranger.setblocking(False)  # noqa: FBT003 - it takes no keyword
                    await trio.lowlevel.wait_readable(stranger)
                    with suppress(ConnectionResetError):  # what it said was not even read
                        assert stranger.recv(1) == b""
    refused = [line for line in logs if line["event"] == "unit-connection-refused"]
    assert len(refused) == 2
    if b"0.0" in said:
        assert f"is kvmd 0.0, and this daemon {__version__}" in refused[1]["problem"]


async def test_limits_are_refused_where_nothing_enforces_them(fake_site: Site) -> None:
    async with last_opened(fake_site) as fleet:
        with pytest.raises(ConfigError, match="limits: nothing would enforce them here"):
            await fleet.create(spec(limits=LimitsSpec(memory=96 << 20)), owner_uid=0)
        assert fleet.machines() == []
