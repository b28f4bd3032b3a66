"""``kvmd daemon`` and ``kvmd machine-process``, as a service manager runs them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from kvmd.guests import GUESTS
from kvmd.machine_process.client import ControlClient, HungUp
from kvmd.machine_process.folder import MACHINE, MachineFile, MachineFolder
from kvmd.machine_process.messages import AskStart, Status, Type, Typed
from kvmd.spec.machine import MachineSpec
from kvmd.stop import NOT_SHUT_DOWN, ExitStatus
from tests.fleet.conftest import Site, last_opened, opened, spec
from tests.fleet.test_contract import STOPPED, running

SECONDS = 60


def socket_of(site: Site) -> Path:
    return site.folder.parent / "api"


def command(site: Site, *options: str, settings: str = "") -> list[str]:
    config = site.folder.parent / "kvmd.toml"
    config.write_text(settings or f'[api]\nsocket = "{socket_of(site)}"\n', encoding="utf-8")
    return [
        *(sys.executable, "-m", "kvmd", "daemon", "--config", str(config), "--state", str(site.folder)),
        *("--log-format", "json", *options),
    ]


@contextmanager
def daemon_of(
    site: Site, settings: str, *options: str, around: Sequence[str] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    """Start the daemon with these settings, and yield when it serves; at the end it ends in order.

    Args:
        site: where its machines are.
        settings: its configuration.
        options: of its command line.
        around: a command that runs it.
    """
    with daemon(site, *options, settings=settings, around=around) as process:
        yield process
        assert process.poll() is None
        end(process)


@contextmanager
def daemon(
    site: Site, *options: str, settings: str = "", around: Sequence[str] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    """Start the daemon, and yield when it serves."""
    with subprocess.Popen(  # noqa: S603 - our own interpreter and module
        [*around, *command(site, *options, settings=settings)], stderr=subprocess.PIPE, bufsize=0
    ) as process:
        try:
            assert process.stderr is not None
            while b"api-serving" not in (line := process.stderr.readline()):
                assert line, "the daemon ended"
            yield process
        finally:
            process.kill()  # where it has not ended yet, the test has failed


def ask(path: Path, method: str, target: str, body: object = None, *, seconds: float = SECONDS) -> tuple[int, Any]:
    """Ask the API, and return the status and what the answer says."""
    data = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {target} HTTP/1.1\r\nHost: kvmd\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n"
    with socket.socket(socket.AF_UNIX) as client, client.makefile("rb") as answer:
        client.settimeout(seconds)
        client.connect(str(path))
        client.sendall(head.encode() + data)
        status = int(answer.readline().split()[1])
        while answer.readline().strip():
            pass
        text = answer.read()
    return status, json.loads(text) if text else None


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
            command(fake_site), stderr=subprocess.PIPE, timeout=SECONDS, check=False
        )
        assert done.returncode == ExitStatus.HOST
        assert b"another daemon (process %d) uses the state folder" % process.pid in done.stderr
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


async def test_a_second_signal_hurries_the_daemon_that_stops_its_machines(fake_site: Site) -> None:
    async with opened(fake_site) as fleet:
        await fleet.create(MachineSpec(kernel=GUESTS["echo"].path, name="stubborn", memory=64 << 20), owner_uid=0)
        await fleet.start("stubborn")
    with daemon(fake_site, "--stop-machines") as process:
        assert process.stderr is not None
        process.send_signal(signal.SIGTERM)
        while b"machine-shutting-down" not in (line := process.stderr.readline()):
            assert line, "the daemon ended"
        assert end(process)[-3:] == ["machine-not-shut-down", "machine-stopped", "daemon-stopped"]
    async with last_opened(fake_site) as fleet:
        found = fleet.machine("stubborn").end
        assert found is not None
        assert (found.reason, found.message) == ("operator", NOT_SHUT_DOWN)


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


@pytest.mark.kvm
def test_a_guest_is_started_over_the_socket(kvm_site: Site) -> None:
    path = socket_of(kvm_site)
    with daemon(kvm_site) as process:
        status, created = ask(path, "POST", "/v1/machines", {"image": "builtin:hello", "name": "first", "vcpus": 2})
        assert (status, created.get("state")) == (201, "created"), created
        status, started = ask(path, "POST", "/v1/machines/first/start")
        assert status == 200, started
        status, waited = ask(path, "GET", f"/v1/machines/first/wait?state=stopped&timeout={SECONDS}")
        assert (status, waited["reached"]) == (200, True), waited
        assert waited["machine"]["end"]["status"] == 0
        assert ask(path, "DELETE", "/v1/machines/first")[0] == 204
        assert ask(path, "GET", "/v1/host")[1]["host"]["usable"] is True
        assert end(process)[-1] == "daemon-stopped"
    assert not path.exists()


def test_systemd_is_told_when_the_daemon_serves_lives_and_stops(fake_site: Site) -> None:
    """With a socket of systemd's, too: clients that come before the daemon wait in its queue."""
    address = str(fake_site.folder.parent / "notify")
    given = fake_site.folder.parent / "given"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified, socket.socket(socket.AF_UNIX) as listener:
        notified.bind(address)
        notified.settimeout(SECONDS)
        listener.bind(str(given))
        listener.listen()

        environment = {
            **os.environ,
            "NOTIFY_SOCKET": address,
            # The first is sent at once, and no more of them than the socket holds until the end is asked for.
            "WATCHDOG_USEC": "10000000",
            "LISTEN_FDS": "1",
            "LISTEN_FDNAMES": "api",
        }
        shell = 'exec 3<&0 </dev/null; export LISTEN_PID=$$; exec "$@"'
        with subprocess.Popen(  # noqa: S603 - our own interpreter and module
            ["/bin/sh", "-c", shell, "sh", *command(fake_site)],
            stdin=listener.fileno(),
            stderr=subprocess.DEVNULL,
            env=environment,
        ) as process:
            assert notified.recv(1000) == b"READY=1\nSTATUS=serving 0 machines"
            assert notified.recv(1000) == b"WATCHDOG=1"
            assert ask(given, "GET", "/v1/machines")[0] == 200
            assert not socket_of(fake_site).exists(), "the one of the configuration is not made"
            process.send_signal(signal.SIGTERM)
            said = {notified.recv(1000)}
            while b"STOPPING=1\nSTATUS=draining" not in said:
                said.add(notified.recv(1000))
            assert process.wait(SECONDS) == 0
        assert given.exists(), "whose socket it is removes it"


@pytest.mark.kvm
def test_two_daemons_on_one_socket(kvm_site: Site) -> None:
    with daemon(kvm_site) as process:
        other = Site("kvm", kvm_site.folder.with_name("other"))
        done = subprocess.run(  # noqa: S603 - our own interpreter and module
            command(other), stderr=subprocess.PIPE, timeout=SECONDS, check=False
        )
        assert done.returncode == ExitStatus.CONFIG
        assert b"another kvmd listens on" in done.stderr
        assert b"Traceback" not in done.stderr
        assert ask(socket_of(kvm_site), "GET", "/v1/machines") == (200, {"machines": []})
        end(process)


@pytest.mark.kvm
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
def test_a_full_disk_is_a_problem_and_leaves_nothing_half_made(kvm_site: Site) -> None:
    path = socket_of(kvm_site)
    kvm_site.folder.mkdir()
    mount = f'mount -t tmpfs -o size=256k none {kvm_site.folder} && exec "$@"'
    with daemon(kvm_site, "--stop-machines", around=("unshare", "-m", "sh", "-c", mount, "sh")) as process:
        made: list[str] = []
        while True:
            status, answer = ask(path, "POST", "/v1/machines", {"image": "builtin:echo", "memory": "2M"})
            if status != 201:
                break
            made.append(answer["name"])
            assert len(made) < 100
        assert (status, answer["type"]) == (503, "urn:kvmd:problem:host-lacks")
        assert "No space left on device" in answer["detail"]
        # Those that were made are whole, and the one that was not has left nothing: there is room again after one goes.
        _, answer = ask(path, "GET", "/v1/machines")
        assert sorted(machine["name"] for machine in answer["machines"]) == sorted(made)
        assert ask(path, "POST", f"/v1/machines/{made[0]}/start")[0] == 200
        for name in made[1:3]:
            assert ask(path, "DELETE", f"/v1/machines/{name}")[0] == 204
        assert ask(path, "POST", "/v1/machines", {"image": "builtin:echo", "memory": "2M", "name": made[1]})[0] == 201
        end(process)
