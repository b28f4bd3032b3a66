"""``kvmd daemon`` and ``kvmd machine-process``, as a service manager runs them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from kvmd.machine_process.client import ControlClient, HungUp
from kvmd.machine_process.folder import MACHINE, MachineFile, MachineFolder
from kvmd.machine_process.messages import AskStart, Status, Type, Typed
from kvmd.stop import ExitStatus
from tests.fleet.conftest import Site, spec
from tests.fleet.test_contract import STOPPED, running
from tests.fleet.test_processes import last_opened, opened

SECONDS = 60


def daemon(site: Site, *options: str) -> subprocess.Popen[bytes]:
    """Start the daemon, and return when it has taken its machines over."""
    process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
        [sys.executable, "-m", "kvmd", "daemon", "--state", str(site.folder), "--log-format", "json", *options],
        stderr=subprocess.PIPE,
        bufsize=0,
    )
    assert process.stderr is not None
    while b"daemon-started" not in (line := process.stderr.readline()):
        assert line, "the daemon ended"
    return process


def end(process: subprocess.Popen[bytes]) -> list[str]:
    """End the daemon as systemd does, and return the names of the events that it logged meanwhile."""
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=SECONDS)
    assert process.returncode == 0
    return [json.loads(line)["event"] for line in log.splitlines()]


async def test_the_daemon_leaves_its_machines_to_the_next_one(fake_site: Site) -> None:
    async with opened(fake_site) as fleet:
        await running(fleet)
    with daemon(fake_site) as process:
        done = subprocess.run(  # noqa: ASYNC221, S603 - nothing else is to happen meanwhile
            [sys.executable, "-m", "kvmd", "daemon", "--state", str(fake_site.folder)],
            stderr=subprocess.PIPE,
            timeout=SECONDS,
            check=False,
        )
        assert done.returncode == ExitStatus.HOST
        assert b"another daemon uses the state folder" in done.stderr
        assert end(process)[-2:] == ["daemon-stopping", "daemon-stopped"]
    async with last_opened(fake_site) as fleet:
        assert fleet.machine("guest").state == "running"


async def test_the_daemon_stops_its_machines_where_it_is_told_to(fake_site: Site) -> None:
    async with opened(fake_site) as fleet:
        await running(fleet)
    with daemon(fake_site, "--stop-machines") as process:
        assert "machine-stopped" in end(process)
    async with last_opened(fake_site) as fleet:
        found = fleet.machine("guest").end
        assert found is not None
        assert found.reason == "operator"


@pytest.mark.kvm
async def test_a_service_manager_may_start_a_machine_s_process(kvm_site: Site, tmp_path: Path) -> None:
    path = tmp_path / "state" / "machines" / "guest"
    path.mkdir(parents=True, mode=0o700)
    with MachineFolder.open(path) as folder:
        folder.write(MACHINE, MachineFile(spec(), 5, 1))
        command = [sys.executable, "-m", "kvmd", "machine-process", str(path)]
        with subprocess.Popen(command) as process, trio.fail_after(SECONDS):  # noqa: ASYNC220, S603 - at once
            client: ControlClient | None = None
            while client is None:
                with suppress(HungUp):
                    client = await ControlClient.connect(folder)
            async with client:
                second = subprocess.run(command, stderr=subprocess.PIPE, check=False)  # noqa: ASYNC221, S603 - at once
                assert second.returncode == ExitStatus.CONFIG
                assert b"another process is that machine" in second.stderr
                async with last_opened(kvm_site) as fleet:
                    assert fleet.machine("guest").state == "created"
                    await client.ask(AskStart(), Status)
                    await client.ask(Type(b"f"), Typed)
                    info = await fleet.wait("guest", STOPPED)
                    assert info.end is not None
                    assert info.end.status == 3
            assert process.wait() == 3
