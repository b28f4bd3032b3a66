"""kvmd under a real systemd, with D-Bus and polkit: units, limits, restarts, the watchdog, the journal.

One systemd for all of it, since Python takes half a minute to start in the lab; the tests stand in the order of their
story, and each needs only what ``host`` gives.
"""

from __future__ import annotations

import os
import signal
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gate import Facility, require_whole
from tests.lab.systemd_host import CGROUP, SystemdHost, booted, hang, until

pytestmark = pytest.mark.kvm

KVMD_UID = 847
VIEWER = (65534, 65534)
"""User and group of somebody who may at most look: nobody and nogroup."""

MIB = 1 << 20
THROTTLED = 20
"""Periods of 100 ms in which a guest was held back, before it is looked at how much it got."""

SPINS = bytes.fromhex("ebfe")  # again: jmp again
"""A guest that is busy for ever."""

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
        images = host.root / "var/lib/kvmd/images"
        images.mkdir()
        (images / "spins.elf").write_bytes(elf(SPINS))
        (images / "stores.elf").write_bytes(elf(STORES))
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
    until(lambda: "echo" in console(host, "limited"))
    # What its process would see that a guest has broken into.
    seen = Path(f"/proc/{host.pid('limited')}/root")
    assert [path.name for path in (seen / "run/kvmd").iterdir()] == ["machines.sock"]
    for folder in ("run/dbus", "var/lib/kvmd/machines"):
        assert list((seen / folder).iterdir()) == []


def test_a_busy_guest_gets_no_more_of_the_processors_than_its_limit(host: SystemdHost) -> None:
    name, asked = "half", {"image": "spins.elf", "limits": {"cpus": 0.5}}
    if not has_cpu_max():
        with pytest.raises(AssertionError, match=r"does not enforce limits.cpus \(cpu.max is none, not 0.5\)"):
            create(host, name, **asked)
        assert [machine["name"] for machine in host.ask("GET", "/v1/machines")["machines"]] == ["limited"]
        return
    started(host, name, **asked)
    cgroup = host.cgroup(name)
    assert (cgroup / "cpu.max").read_text().split() == ["50000", "100000"]
    assert host.shown(cgroup.name, "CPUQuotaPerSecUSec") == "500ms"
    before, began = cpu_stat(cgroup), time.monotonic()
    # By its own count and the kernel's, until it has been held back twenty times: two seconds at least.
    while (now := cpu_stat(cgroup))["nr_throttled"] - before["nr_throttled"] < THROTTLED:
        time.sleep(0.1)
    used = (now["usage_usec"] - before["usage_usec"]) / 1e6 / (time.monotonic() - began)
    assert now["throttled_usec"] > before["throttled_usec"]
    # One period's quota more than a half where the looks fall badly, and what the scheduler takes back later.
    assert used < 0.6
    assert host.ask("POST", f"/v1/machines/{name}/stop")["machine"]["end"]["reason"] == "operator"


def has_cpu_max() -> bool:
    """Whether the kernel has CONFIG_CFS_BANDWIDTH: a cgroup with the controller has the file then."""
    return any(True for _ in CGROUP.rglob("cpu.max"))


def cpu_stat(cgroup: Path) -> dict[str, int]:
    """Return the kernel's figures of a cgroup's processors: Documentation/admin-guide/cgroup-v2.rst, "CPU"."""
    lines = (cgroup / "cpu.stat").read_text().splitlines()
    return {name: int(value) for name, _, value in (line.partition(" ") for line in lines)}


def test_a_machine_s_first_output_comes_without_waiting_for_a_process(
    host: SystemdHost, capsys: pytest.CaptureFixture[str]
) -> None:
    # The one that waits: from now on none is starting beside.
    until(lambda: host.waiting() == 1)
    began = time.monotonic()
    create(host, "quick")
    created = time.monotonic()
    host.ask("POST", "/v1/machines/quick/start")
    until(lambda: "echo" in console(host, "quick"))
    took = time.monotonic() - began
    cgroup = host.cgroup("quick")
    imports = int(cpu_stat(cgroup)["usage_usec"]) / 1e6
    with capsys.disabled():
        print(  # noqa: T201 - a measurement
            f"\nunder systemd, in the lab: POST to first output {took:.2f} s, "
            f"of which creating {created - began:.2f} s; "
            f"the machine's process has taken {imports:.1f} s of CPU since its unit's start"
        )
    # Nearly all of that is Python's imports, which were done before the POST.
    assert took < imports


def test_a_reload_takes_over_what_can_change(host: SystemdHost) -> None:
    with (host.root / "etc/kvmd/kvmd.toml").open("a") as config:
        config.write('[api]\nviewers = "nogroup"\nsocket = "/run/kvmd/other.sock"\n')
    assert host.status_for(VIEWER, "GET", "/v1/machines") == 403
    host.run("systemctl", "reload", "kvmd")
    said = until(lambda: host.journal("KVMD_EVENT=configuration-reloaded"))
    assert said == ["configuration-reloaded file=/etc/kvmd/kvmd.toml"]
    assert host.journal("KVMD_EVENT=restart-needed", field="KVMD_KEYS") == ['["api.socket"]']
    assert host.shown("kvmd.service", "StatusText") == "configuration reloaded; 1 keys wait for a restart"
    assert host.shown("kvmd.service", "ActiveState") == "active"
    assert host.status_for(VIEWER, "GET", "/v1/machines") == 200
    assert host.status_for(VIEWER, "POST", "/v1/machines/limited/pause") == 403


def test_a_machine_that_wants_more_memory_than_its_limit_ends_with_that_reason(host: SystemdHost) -> None:
    started(host, "hungry", image="stores.elf", memory="256M", limits={"memory": "64M"})
    end = host.stopped("hungry")
    assert (end["reason"], end["status"], end["signal"]) == ("out-of-memory", 137, 9)
    assert end["message"] == "the kernel ended its process for want of memory: limits.memory is 64 MiB"
    assert host.machine("limited")["state"] == "running"
    assert until(lambda: host.journal("KVMD_MACHINE=hungry", "KVMD_REASON=out-of-memory", "PRIORITY=4"))


def test_what_hangs_is_ended_alone_by_its_watchdog_and_what_happens_meanwhile_is_known(host: SystemdHost) -> None:
    # A machine that is killed, one that hangs, and the daemon that could have seen it.
    started(host, "silent")
    was, pid, told = host.machine("limited"), host.pid("limited"), console(host, "limited")
    before, victims = host.daemon(), {name: host.cgroup(name) for name in ("quick", "silent")}
    hang(host.pid("silent"))
    hang(before)
    os.kill(host.pid("quick"), signal.SIGKILL)
    until(lambda: not any(cgroup.exists() for cgroup in victims.values()))
    until(lambda: host.daemon() != before)
    assert host.machine("limited") == was
    assert host.pid("limited") == pid
    assert console(host, "limited") == told
    assert host.shown("kvmd.service", "NRestarts") == "1"
    end = host.stopped("quick")
    assert (end["reason"], end["status"], end["signal"]) == ("process-died", 137, 9)
    end = host.stopped("silent")
    assert end["reason"] == "process-died"
    assert end["message"] == "its process was ended by systemd, since its event loop stood still"


def test_machines_go_on_while_the_daemon_is_restarted(host: SystemdHost) -> None:
    was, pid, before = host.machine("limited"), host.pid("limited"), host.daemon()
    host.run("systemctl", "restart", "kvmd")
    assert host.daemon() != before
    assert host.machine("limited") == was
    assert host.pid("limited") == pid


def test_every_line_of_a_machine_in_the_journal_carries_its_name(host: SystemdHost) -> None:
    wanted = {"machine-created", "machine-starting", "machine-found"}
    # The journal reads what it is sent when it has the time.
    assert until(lambda: wanted <= set(host.journal("KVMD_MACHINE=limited", field="KVMD_EVENT")))
    unit = host.cgroup("limited").name
    assert "machine-starting" in host.journal(f"_SYSTEMD_UNIT={unit}", "KVMD_MACHINE=limited", field="KVMD_EVENT")


def test_one_command_stops_everything_in_order(host: SystemdHost) -> None:
    folder = host.root / "var/lib/kvmd/machines/limited"
    # A process in reserve that was starting when a test before restarted its daemon found none, and its unit failed.
    host.run("systemctl", "reset-failed")
    host.run("systemctl", "stop", "kvmd.socket", "kvmd.slice")
    assert not (CGROUP / "kvmd.slice").exists()
    assert '"reason":"operator"' in (folder / "end.json").read_text()
    assert host.run("systemctl", "list-units", "--plain", "--no-legend", "kvmd-machine@*", "kvmd.service") == ""
