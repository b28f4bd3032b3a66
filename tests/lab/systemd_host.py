"""A systemd with kvmd's units, as PID 1 of namespaces of its own in the lab: tests/lab/systemd/boot."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tests.fleet.test_commands import ask

REPOSITORY = Path(__file__).resolve().parents[2]
BOOT = Path(__file__).parent / "systemd" / "boot"
CGROUP = Path("/sys/fs/cgroup/kvmdtest")
PATIENCE_SECONDS = 300
"""Far more than anything takes, in a lab whose host is busy."""

_SOCKET = "/run/kvmd/kvmd.sock"
_VIEW_SOCKET = "/run/kvmd/view.sock"
_LOOK_SECONDS = 0.1

T = TypeVar("T")


@dataclass(frozen=True)
class SystemdHost:
    """What is inside, seen from outside.

    Attributes:
        init: its PID 1, by its number outside.
    """

    init: int

    @property
    def root(self) -> Path:
        """Its root folder."""
        return Path(f"/proc/{self.init}/root")

    @property
    def api(self) -> Path:
        """The API's socket."""
        return self.root / _SOCKET.lstrip("/")

    def run(self, *command: str) -> str:
        """Run a command inside, as root, and return what it printed."""
        done = subprocess.run(  # noqa: S603 - a command of the test's
            ["/usr/bin/nsenter", f"--target={self.init}", "--all", "--", *command],
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE_SECONDS,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def ask(self, method: str, target: str, body: object = None) -> Any:
        """Ask the API, which has to say yes."""
        status, answer = ask(self.api, method, target, body, seconds=PATIENCE_SECONDS)
        assert 200 <= status < 300, answer
        return answer

    def status_for(self, user: tuple[int, int], method: str, target: str) -> int:
        """Return the status that a user and group get at the viewers' socket."""
        uid, gid = user
        credentials = [f"--reuid={uid}", f"--regid={gid}", "--clear-groups"]
        request = f"{method} {target} HTTP/1.1\r\nHost: kvmd\r\n\r\n"
        program = f"import socket; s = socket.socket(1); s.connect({_VIEW_SOCKET!r}); s.sendall({request.encode()!r})"
        program += "; print(s.recv(99).split()[1].decode())"
        return int(self.run("setpriv", *credentials, "/usr/bin/python3", "-S", "-c", program))

    def waiting(self) -> int:
        """Return how many units wait for a machine."""
        running = "list-units", "--plain", "--no-legend", "--state=active", "kvmd-machine@*"
        units = [line.split()[0] for line in self.run("systemctl", *running).splitlines()]
        return sum(self.shown(unit, "StatusText") == "waits for a machine" for unit in units)

    def machine(self, name: str) -> Any:
        """Return a machine as the API shows it."""
        return self.ask("GET", f"/v1/machines/{name}")

    def stopped(self, name: str) -> Any:
        """Wait for a machine's end, and return how that was."""
        waited = self.ask("GET", f"/v1/machines/{name}/wait?state=stopped&timeout=60")
        assert waited["reached"], waited
        return waited["machine"]["end"]

    def cgroup(self, machine: str) -> Path:
        """Return the cgroup of a machine's process."""
        comm = f"kvmd:{machine}"
        for cgroup in CGROUP.glob("kvmd.slice/kvmd-machine@*.service"):
            for pid in (cgroup / "cgroup.procs").read_text().split():
                if Path(f"/proc/{pid}/comm").read_text().strip() == comm:
                    return cgroup
        raise AssertionError(f"{machine} is in no unit of a machine")

    def pid(self, machine: str) -> int:
        """Return the number of a machine's process, outside."""
        (pid,) = (self.cgroup(machine) / "cgroup.procs").read_text().split()
        return int(pid)

    def daemon(self) -> int:
        """Return the number of the daemon's process, outside."""
        pids = (CGROUP / "kvmd.slice/kvmd.service/cgroup.procs").read_text().split()
        (pid,) = [pid for pid in pids if Path(f"/proc/{pid}/comm").read_text().strip() == "kvmd"]
        return int(pid)

    def journal(self, *matches: str, field: str = "MESSAGE") -> list[str]:
        """Return a field of the journal's entries that match."""
        return self.run("journalctl", "--no-pager", "--output=cat", f"--output-fields={field}", *matches).splitlines()

    def shown(self, unit: str, name: str) -> str:
        """Return a property of a unit."""
        return self.run("systemctl", "show", "--value", f"--property={name}", unit).strip()


def until(look: Callable[[], T]) -> T:
    """Return what ``look`` returns, as soon as that is something; where it raises, something is not there yet."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            if found := look():
                return found
        except (OSError, LookupError, ValueError, AssertionError):
            if time.monotonic() > deadline:
                raise
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(_LOOK_SECONDS)


@contextmanager
def booted(scratch: Path) -> Iterator[SystemdHost]:
    """Boot it, and end everything in it after the block.

    Args:
        scratch: an empty folder.
    """
    command = [str(BOOT), str(scratch), str(REPOSITORY), sys.base_prefix]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as boot:  # noqa: S603 - our own script
        try:

            def init() -> int:
                assert boot.poll() is None, "it does not boot"
                return int((CGROUP / "init.scope/cgroup.procs").read_text().split()[0])

            host = SystemdHost(until(init))
            until(host.api.exists)
            try:
                yield host
            finally:
                # pytest shows it where a test has failed.
                sys.stdout.write(host.run("journalctl", "--no-pager", "--boot", "--lines=200"))
        finally:
            # The kernel ends all of a namespace with its PID 1.
            boot.kill()
    until(lambda: not any(_processes(CGROUP)))
    for folder, _, _ in os.walk(CGROUP, topdown=False):
        Path(folder).rmdir()


def _processes(cgroup: Path) -> Iterator[str]:
    for file in cgroup.rglob("cgroup.procs"):
        yield from file.read_text().split()


def hang(pid: int) -> None:
    """Have a process stand still, as one does whose loop hangs."""
    os.kill(pid, signal.SIGSTOP)
