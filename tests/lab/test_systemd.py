"""kvmd under a real systemd, with D-Bus and polkit: units, limits, restarts, the watchdog, the journal.

One systemd for all of it, since Python takes half a minute to start in the lab; the tests stand in the order of their
story, and each needs only what ``host`` gives.
"""

from __future__ import annotations

import os
import signal
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gate import Facility, require_whole
from tests.lab.systemd_host import CGROUP, SystemdHost, booted, hang, until

pytestmark = pytest.mark.kvm

KVMD_UID = 847
MIB = 1 << 20

STORES = bytes.fromhex(
    "b800002000"  # mov eax, 0x200000
    "488900"  # again: mov [rax], rax
    "480500100000"  # add rax, 4096
    "ebf5"  # jmp again
)
"""A guest that writes to every page of its memory."""


def elf(code: bytes) -> bytes:
    """Return a payload: docs/payload-abi.md."""
    at, offset = 0x10_0000, 0x1000
    head = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", 2, 62, 1, at, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    load = struct.pack("<IIQQQQQQ", 1, 5, offset, at, at, len(code), len(code), 0x1000)
    return (head + load).ljust(offset, b"\0") + code


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SystemdHost]:
    """Return a systemd on which kvmd was started by its socket."""
    require_whole(Facility.SYSTEMD)
    with booted(tmp_path_factory.mktemp("systemd")) as host:
        assert host.shown("kvmd.service", "ActiveState") == "inactive"
        assert host.ask("GET", "/v1/machines") == {"machines": []}
        yield host


def create(host: SystemdHost, name: str, **fields: object) -> Any:
    body = {"image": "builtin:echo", "name": name, "memory": "16M", **fields}
    return host.ask("POST", "/v1/machines", body)


def started(host: SystemdHost, name: str, **fields: object) -> Any:
    create(host, name, **fields)
    return host.ask("POST", f"/v1/machines/{name}/start")


def console(host: SystemdHost, name: str) -> str:
    """Return what a machine has printed: its files are the daemon's user's."""
    folder = host.root / "var/lib/kvmd/machines" / name
    return "".join(path.read_text() for path in sorted(folder.glob("console-*")))


def test_a_machine_is_a_unit_of_its_own_with_its_limits(host: SystemdHost) -> None:
    started(host, "limited", limits={"memory": "96M", "tasks": 32})
    assert Path(f"/proc/{host.daemon()}").stat().st_uid == KVMD_UID
    assert Path(f"/proc/{host.pid('limited')}").stat().st_uid == KVMD_UID
    cgroup = host.cgroup("limited")
    assert cgroup.parent == CGROUP / "kvmd.slice"
    assert (cgroup / "memory.max").read_text().strip() == str(96 * MIB)
    assert (cgroup / "memory.swap.max").read_text().strip() == "0"
    assert (cgroup / "pids.max").read_text().strip() == "32"
    assert host.shown(cgroup.name, "StatusText") == "machine limited"
    assert "echo" in until(lambda: console(host, "limited"))
    # What its process would see that a guest has broken into.
    seen = Path(f"/proc/{host.pid('limited')}/root")
    assert [path.name for path in (seen / "run/kvmd").iterdir()] == ["machines.sock"]
    for folder in ("run/dbus", "var/lib/kvmd/machines"):
        assert list((seen / folder).iterdir()) == []


def test_a_limit_that_the_kernel_cannot_enforce_is_refused(host: SystemdHost) -> None:
    if list(CGROUP.rglob("cpu.max")):
        started(host, "half", limits={"cpus": 0.5})
        assert (host.cgroup("half") / "cpu.max").read_text().split() == ["50000", "100000"]
        return
    with pytest.raises(AssertionError, match=r"does not enforce limits.cpus \(cpu.max is none, not 0.5\)"):
        create(host, "half", limits={"cpus": 0.5})
    assert [machine["name"] for machine in host.ask("GET", "/v1/machines")["machines"]] == ["limited"]


def test_a_reload_takes_over_what_can_change(host: SystemdHost) -> None:
    images = host.root / "var/lib/kvmd/images"
    images.mkdir(exist_ok=True)
    (images / "stores.elf").write_bytes(elf(STORES))
    with pytest.raises(AssertionError, match="invalid-image"):
        create(host, "hungry", image="stores.elf", memory="256M", limits={"memory": "64M"})
    with (host.root / "etc/kvmd/kvmd.toml").open("a") as config:
        config.write('[images]\nfolders = ["/var/lib/kvmd/images"]\n[api]\nviewers = "kvm"\n')
    host.run("systemctl", "reload", "kvmd")
    said = until(lambda: host.journal("KVMD_EVENT=configuration-reloaded"))
    assert said == ["configuration-reloaded file=/etc/kvmd/kvmd.toml"]
    assert host.journal("KVMD_EVENT=restart-needed", field="KVMD_KEYS") == ['["api.viewers"]']
    assert host.shown("kvmd.service", "StatusText") == "configuration reloaded; 1 keys wait for a restart"
    assert host.shown("kvmd.service", "ActiveState") == "active"


def test_a_machine_that_wants_more_memory_than_its_limit_ends_with_that_reason(host: SystemdHost) -> None:
    started(host, "hungry", image="stores.elf", memory="256M", limits={"memory": "64M"})
    end = host.stopped("hungry")
    assert (end["reason"], end["status"], end["signal"]) == ("out-of-memory", 137, 9)
    assert end["message"] == "the kernel ended its process for want of memory: limits.memory is 64 MiB"
    assert host.machine("limited")["state"] == "running"
    assert host.journal("KVMD_MACHINE=hungry", "KVMD_REASON=out-of-memory", "PRIORITY=4") != []


def test_a_daemon_that_hangs_is_ended_by_the_watchdog_and_what_happens_meanwhile_is_known(host: SystemdHost) -> None:
    started(host, "killed")
    was, pid, told = host.machine("limited"), host.pid("limited"), console(host, "limited")
    before, cgroup, victim = host.daemon(), host.cgroup("killed"), host.pid("killed")
    hang(before)
    os.kill(victim, signal.SIGKILL)
    until(lambda: not cgroup.exists())
    until(lambda: host.daemon() != before)
    assert host.machine("limited") == was
    assert host.pid("limited") == pid
    assert console(host, "limited") == told
    assert host.shown("kvmd.service", "NRestarts") == "1"
    end = host.stopped("killed")
    assert (end["reason"], end["status"], end["signal"]) == ("process-died", 137, 9)


def test_machines_go_on_while_the_daemon_is_restarted(host: SystemdHost) -> None:
    was, pid, before = host.machine("limited"), host.pid("limited"), host.daemon()
    host.run("systemctl", "restart", "kvmd")
    assert host.daemon() != before
    assert host.machine("limited") == was
    assert host.pid("limited") == pid


def test_every_line_of_a_machine_in_the_journal_carries_its_name(host: SystemdHost) -> None:
    said = host.journal("KVMD_MACHINE=limited", field="KVMD_EVENT")
    assert {"machine-created", "machine-starting", "machine-found"} <= set(said)
    unit = host.cgroup("limited").name
    assert "machine-starting" in host.journal(f"_SYSTEMD_UNIT={unit}", "KVMD_MACHINE=limited", field="KVMD_EVENT")


def test_one_command_stops_everything_in_order(host: SystemdHost) -> None:
    folder = host.root / "var/lib/kvmd/machines/limited"
    host.run("systemctl", "stop", "kvmd.socket", "kvmd.slice")
    assert not (CGROUP / "kvmd.slice").exists()
    assert '"reason":"operator"' in (folder / "end.json").read_text()
    assert host.run("systemctl", "list-units", "--plain", "--no-legend", "kvmd-machine@*", "kvmd.service") == ""
