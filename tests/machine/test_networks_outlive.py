"""Networks of machines that run are nobody's leftovers, whatever becomes of the daemon; those of dead ones are."""

from __future__ import annotations

import os
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path

import pytest

from kvmd.network import namespace
from kvmd.network.naming import GROUP
from tests.linux.kernels import running
from tests.linux_guest.daemon import Daemon
from tests.own_network import own_network

pytestmark = [pytest.mark.kvm, pytest.mark.network]

SECONDS = 30.0


def ours() -> set[str]:
    """Return the interfaces that kvmd made; one that goes meanwhile is none."""
    found = set()
    for _, name in socket.if_nameindex():
        with suppress(OSError):
            if int(Path(f"/sys/class/net/{name}/netdev_group").read_text()) == GROUP:
                found.add(name)
    return found


@own_network
def test_a_restarted_daemon_leaves_the_networks_of_machines_that_run(tmp_path: Path) -> None:
    (tmp_path / "kernel").write_bytes(running(b"\xf4\xeb\xfe"))  # hlt

    def daemon() -> Daemon:
        return Daemon(tmp_path, images=[tmp_path], bridges=["one", "two"])

    with daemon() as first:
        for name in ("one", "two"):
            network = {"kind": "made-bridge", "bridge": name}
            wanted = {"name": name, "kernel": "kernel", "memory": "64M", "entropy": False, "networks": [network]}
            first.ask("POST", "/v1/machines", wanted)
            first.ask("POST", f"/v1/machines/{name}/start")
        made = ours()
        assert made == {"one", "kvmd-one", "two", "kvmd-two"}
        victim = os.pidfd_open(first.ask("GET", "/v1/machines/two")["pid"])
        first.kill()
    try:
        with daemon() as second:
            assert ours() == made
            assert second.ask("GET", "/v1/machines/one")["state"] == "running"
            second.kill()
        # Dies while no daemon is there to see it: its tap goes with it, its bridge cannot.
        signal.pidfd_send_signal(victim, signal.SIGKILL)
        deadline = time.monotonic() + SECONDS
        while "kvmd-two" in ours():
            assert time.monotonic() < deadline
    finally:
        os.close(victim)
    assert ours() == {"one", "kvmd-one", "two"}
    with daemon() as third:
        assert ours() == {"one", "kvmd-one"}
        assert third.ask("GET", "/v1/machines/two")["end"]["reason"] == "process-died"
        third.ask("POST", "/v1/machines/one/stop")
        assert ours() == set()


@own_network
@pytest.mark.parametrize("end", ["delete", "kill", "die", "stop-all"])
def test_the_networks_of_a_machine_that_cannot_remove_them_itself_go_with_it(tmp_path: Path, end: str) -> None:
    (tmp_path / "kernel").write_bytes(running(b"\xf4\xeb\xfe"))  # hlt
    networks = [{"kind": "made-bridge", "bridge": "made"}, {"kind": "namespace"}]
    wanted = {"name": "m", "kernel": "kernel", "memory": "64M", "entropy": False, "networks": networks}
    with Daemon(tmp_path, images=[tmp_path], bridges=["made"], namespaces=True) as daemon:
        made = daemon.ask("POST", "/v1/machines", wanted)
        assert ours() == {"made", "kvmd-m"}
        assert namespace.ours_perhaps() == ["kvmd-m+1"]
        if end == "delete":
            daemon.ask("DELETE", "/v1/machines/m")
        elif end == "kill":
            daemon.ask("POST", "/v1/machines/m/kill")
        elif end == "die":
            os.kill(made["pid"], signal.SIGKILL)
            daemon.ask("GET", f"/v1/machines/m/wait?state=stopped&timeout={SECONDS:.0f}")
        else:
            daemon.close()
        assert ours() == set()
        assert namespace.ours_perhaps() == []
