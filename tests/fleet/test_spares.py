"""The process that is forked before anybody asks for a machine."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

import trio

from tests.fleet.conftest import MARK, Site, parent_of, processes_of, spec
from tests.fleet.test_processes import SECONDS, gone, last_opened, pid_of


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


def open_files_of(pid: int) -> list[str]:
    """Return what a process's descriptors are of."""
    return [str(descriptor.readlink()) for descriptor in Path(f"/proc/{pid}/fd").iterdir()]


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
        held = open_files_of(spare)
        assert held, "it waits at something"
        assert not [path for path in held if "machines" in path]
