"""The process that is forked before anybody asks for a machine."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from kvmd.machine_process.folder import EXIT, ExitFile, MachineFolder
from kvmd.machine_process.spare import open_child
from tests.fleet.conftest import (
    MARK,
    SECONDS,
    Site,
    gone,
    last_opened,
    open_files_of,
    opened,
    parent_of,
    pid_of,
    processes_of,
    spec,
)


async def spare_beside(*machines: int) -> int:
    """Wait until the parent of the machines' processes has another child, and return that."""
    parent = parent_of(machines[0])
    with trio.fail_after(SECONDS):
        while True:
            for pid in processes_of(os.environ[MARK]):
                with suppress(OSError):  # it ended just now
                    if pid not in machines and parent_of(pid) == parent:
                        return pid
            await trio.sleep(0.005)


async def test_the_next_machine_s_process_is_there_before_anybody_asks(fake_site: Site) -> None:
    async with last_opened(fake_site) as fleet:
        pids = [pid_of(await fleet.create(spec("first"), owner_uid=0))]
        for name in ("second", "third"):
            spare = await spare_beside(*pids)
            pids.append(pid_of(await fleet.create(spec(name), owner_uid=0)))
            assert pids[-1] == spare
            assert (await fleet.start(name)).state == "running"


async def test_a_spare_that_is_killed_costs_nobody_a_machine(fake_site: Site) -> None:
    async with last_opened(fake_site) as fleet:
        spare = await spare_beside(pid_of(await fleet.create(spec("first"), owner_uid=0)))
        ended = os.pidfd_open(spare)
        os.kill(spare, signal.SIGKILL)
        await gone(ended)
        for name in ("second", "third"):
            assert pid_of(await fleet.create(spec(name), owner_uid=0)) != spare
            assert (await fleet.start(name)).state == "running"


async def test_a_spare_has_nothing_of_a_machine_s_open(fake_site: Site) -> None:
    async with last_opened(fake_site) as fleet:
        machines = [pid_of(await fleet.create(spec(name), owner_uid=0)) for name in ("first", "second")]
        spare = await spare_beside(*machines)
        with trio.fail_after(SECONDS):
            # A fork has all that its parent has open, and closes it before it waits.
            while any("machines" in path for path in open_files_of(spare)):  # noqa: ASYNC110 - nobody tells when
                await trio.sleep(0.005)
        assert open_files_of(spare), "it waits at something"


async def test_a_spare_and_a_daemon_that_end_together_take_no_machine_s_parent_along(fake_site: Site) -> None:
    async with opened(fake_site) as fleet:
        machine = pid_of(await fleet.create(spec(), owner_uid=0))
        spare = await spare_beside(machine)
        parent = parent_of(machine)
        ended = os.pidfd_open(parent)
        # It finds both ends at once.
        os.kill(parent, signal.SIGSTOP)
        os.kill(spare, signal.SIGKILL)
    os.kill(parent, signal.SIGCONT)
    with trio.fail_after(SECONDS):
        while is_there(spare):  # noqa: ASYNC110 - another process reaps it, and tells nobody
            await trio.sleep(0.005)
    await ends_with_its_child(fake_site, machine, ended)


async def test_a_spare_that_is_stopped_does_not_stop_its_parent(fake_site: Site) -> None:
    async with opened(fake_site) as fleet:
        machine = pid_of(await fleet.create(spec(), owner_uid=0))
        spare = await spare_beside(machine)
        ended = os.pidfd_open(parent_of(machine))
        os.kill(spare, signal.SIGSTOP)
    await ends_with_its_child(fake_site, machine, ended)


def is_there(pid: int) -> bool:
    """Tell whether there is such a process, be it one that was not reaped yet."""
    return Path(f"/proc/{pid}").exists()


async def ends_with_its_child(site: Site, machine: int, parent: int) -> None:
    """See that a parent without a daemon says how its last child ended, and ends."""
    os.kill(machine, signal.SIGKILL)
    await gone(parent)
    with MachineFolder.open(site.path("guest")) as folder:
        told = folder.read(EXIT, ExitFile)
    assert told is not None
    assert (told.pid, told.signal) == (machine, signal.SIGKILL)
    async with last_opened(site):
        pass


def test_a_child_that_cannot_be_watched_is_ended() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = os.dup(0)
    os.close(taken)
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            open_child(child.pid)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with pytest.raises(ChildProcessError):
        os.waitpid(child.pid, os.WNOHANG)
    child.wait()
