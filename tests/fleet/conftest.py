"""Fleets for tests: in memory, of processes with fake machines, of processes with KVM."""

from __future__ import annotations

import os
import signal
import sys
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from kvmd.fleet import all_events, asking, recovery
from kvmd.fleet.base import Fleet, MachineInfo
from kvmd.fleet.local import LocalFleet, open_fleet
from kvmd.fleet.spawner_link import SPAWNER
from kvmd.guests import GUESTS
from kvmd.spec.machine import MachineSpec
from tests.fleet.fakes import FakeFleet
from tests.gate import Facility, require_whole

FAKE_SPAWNER = (sys.executable, str(Path(__file__).with_name("fake_spawner.py")))
MARK = "KVMD_TEST_PROCESSES_OF"
"""An environment variable that all processes of a test inherit, so that those left behind are found."""

PATIENCE_SECONDS = 60.0
"""How long a machine may take that is given a second or five in earnest."""

GONE_SECONDS = 60.0
"""How long a test's processes may take to end after it; only those that are left behind take so long."""

SECONDS = 90
"""More than anything takes that is waited for."""


def spec(name: str = "guest", **changes: object) -> MachineSpec:
    """Return a small machine whose guest is ``echo``."""
    fields: dict[str, object] = {"image": GUESTS["echo"].path, "name": name, "memory": 4 << 20, **changes}
    return MachineSpec(**fields)  # type: ignore[arg-type]  # the spec checks them


@dataclass
class Site:
    """A place for fleets, one after the other, on the same machines."""

    kind: str
    folder: Path
    spawner: Sequence[str] = SPAWNER
    memory: FakeFleet = field(default_factory=FakeFleet)

    def open(self) -> AbstractAsyncContextManager[Fleet]:
        """Open a fleet."""
        return self._in_memory() if self.kind == "memory" else self.open_local()

    def open_local(self) -> AbstractAsyncContextManager[LocalFleet]:
        """Open one of real processes."""
        return open_fleet(self.folder, spawner=self.spawner)

    @asynccontextmanager
    async def _in_memory(self) -> AsyncIterator[Fleet]:
        yield self.memory

    def path(self, name: str) -> Path:
        """Return a machine's folder."""
        return self.folder / "machines" / name


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


def processes_of(mark: str) -> list[int]:
    """Return the processes that inherited the mark, without this one."""
    found = []
    wanted = f"{MARK}={mark}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with suppress(OSError):
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def open_files_of(pid: int) -> list[str]:
    """Return what a process's descriptors are of; one that it closes meanwhile is left out.

    Raises:
        OSError: the process has ended.
    """
    found = []
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            found.append(str(descriptor.readlink()))
    return found


def parent_of(pid: int) -> int:
    """Return a process's parent: field 4 of proc(5), /proc/pid/stat."""
    return int(Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[1])


@pytest.fixture(autouse=True)
def _machines_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a machine answer and end as slowly as a busy machine makes it: it is not given up, nor taken for silent."""
    for module, name in ((recovery, "ANSWER_SECONDS"), (all_events, "_OPEN_SECONDS"), (asking, "END_SECONDS")):
        monkeypatch.setattr(module, name, PATIENCE_SECONDS)


@pytest.fixture
def _no_process_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail a test that leaves a process, and end it."""
    mark = uuid.uuid4().hex
    monkeypatch.setenv(MARK, mark)
    yield
    deadline = time.monotonic() + GONE_SECONDS
    while (left := processes_of(mark)) and time.monotonic() < deadline:
        time.sleep(0.02)
    if left:
        found = {}
        for pid in left:
            with suppress(OSError):  # it ended just now, too late all the same
                found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                os.kill(pid, signal.SIGKILL)
        pytest.fail(f"left behind: {found or left}", pytrace=False)


@pytest.fixture(params=["memory", "process", pytest.param("kvm", marks=pytest.mark.kvm)])
def site(request: pytest.FixtureRequest, tmp_path: Path, _no_process_left: None) -> Site:
    """Return a place for any kind of fleet: what is asked of it is the contract."""
    kind = str(request.param)
    return Site(kind, tmp_path / "state", FAKE_SPAWNER if kind == "process" else SPAWNER)


@pytest.fixture
def fake_site(tmp_path: Path, _no_process_left: None) -> Site:
    """Return a place for fleets of real processes with fake machines."""
    return Site("process", tmp_path / "state", FAKE_SPAWNER)


@pytest.fixture
def kvm_site(tmp_path: Path, _no_process_left: None) -> Site:
    """Return a place for fleets of machines on KVM."""
    require_whole(Facility.KVM)
    return Site("kvm", tmp_path / "state")


@pytest.fixture(params=["fake", pytest.param("kvm", marks=pytest.mark.kvm)])
def local_site(request: pytest.FixtureRequest) -> Site:
    """Return a place for fleets of real processes, with fake machines and on KVM."""
    site = request.getfixturevalue(f"{request.param}_site")
    assert isinstance(site, Site)
    return site
