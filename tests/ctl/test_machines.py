from __future__ import annotations

from pathlib import Path

import pytest

from tests.ctl.conftest import Kvmctl
from tests.ctl.running import with_pipes
from tests.ctl.serving import Daemon

pytestmark = pytest.mark.usefixtures("daemon")


def test_no_machines_are_a_heading(kvmctl: Kvmctl) -> None:
    outcome = kvmctl("ps")
    assert outcome.status == 0
    assert outcome.out.split() == ["NAME", "STATE", "IMAGE", "VCPUS", "MEMORY", "PROTECTION", "PID", "AGE", "END"]
    assert kvmctl("ps", "-q").out == ""
    assert kvmctl("ps", "--output", "json").json == {"machines": []}


def test_a_machine_s_life(kvmctl: Kvmctl, daemon: Daemon) -> None:
    assert kvmctl("create", "builtin:hello", "--name", "one", "--memory", "16M", "--vcpus", "2").out == "one\n"
    row = kvmctl("ps").out.splitlines()[1].split()
    assert row[:6] == ["one", "created", "builtin:hello", "2", "16", "MiB"]
    for action, state in (("start", "running"), ("pause", "paused"), ("resume", "running")):
        outcome = kvmctl(action, "one")
        assert (outcome.status, outcome.out, outcome.err) == (0, "one\n", "")
        assert daemon.do(lambda: daemon.fleet.machine("one").state) == state
    assert kvmctl("wait", "one", "--for", "running").out == "one: running\n"
    assert kvmctl("stop", "one").out == "one\n"
    assert kvmctl("wait", "one").out == "one: operator, status 126: stopped by the operator\n"
    assert kvmctl("wait", "one", "--exit-status").status == 126
    assert kvmctl("rm", "one").out == "one\n"
    assert kvmctl("ps", "-q").out == ""


def test_a_machine_of_a_file(kvmctl: Kvmctl, daemon: Daemon, tmp_path: Path) -> None:
    (tmp_path / "guest.elf").write_bytes(b"\x7fELF")
    file = tmp_path / "spec.toml"
    file.write_text('image = "guest.elf"\nmemory = "32 MiB"\narguments = [1, 2]\n[conversion]\nchunk = "1 mib"\n')
    machine = kvmctl("create", str(file), "--vcpus", "3", "-o", "json").json
    assert machine["name"] == "guest"
    spec = daemon.do(lambda: daemon.fleet.machine("guest").spec)
    assert (spec.memory, spec.vcpus, spec.arguments, spec.conversion.chunk) == (32 << 20, 3, (1, 2), 1 << 20)


def test_waiting_goes_on_over_a_restart(kvmctl: Kvmctl, daemon: Daemon) -> None:
    kvmctl("run", "--detach", "builtin:hello", "--name", "one")
    with with_pipes(daemon.path, "wait", "one", "--exit-status") as wait:
        daemon.until_asked()
        daemon.stop()
        wait.until(b"trying again")
        daemon.start()
        daemon.guest("one", lambda guest: guest.end(status=9))
        assert b"one: guest-exit, status 9: ended" in wait.rest()
        assert wait.wait() == 9
