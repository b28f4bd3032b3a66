"""What is asked of ``systemctl``, and what is made of its answers; the real one is in tests/lab/test_systemd.py."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from kvmd.errors import HostError
from kvmd.fleet.units import SystemdUnits
from kvmd.spec.limits import LimitsSpec

UNIT = "kvmd-machine@7.service"


class Systemctl:
    """A stand-in for the program, which writes down what it is asked."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "systemctl"
        self.seen = folder / "seen"
        self.seen.touch()
        self.does()

    def does(self, shell: str = "", status: int = 0) -> None:
        self.path.write_text(f'#!/bin/sh\necho "$*" >>{self.seen}\n{shell}\nexit {status}\n')
        self.path.chmod(0o755)

    @property
    def units(self) -> SystemdUnits:
        return SystemdUnits([str(self.path)])

    @property
    def asked(self) -> list[str]:
        return [line.removeprefix("--no-ask-password --no-pager ") for line in self.seen.read_text().splitlines()]


@pytest.fixture
def systemctl(tmp_path: Path) -> Systemctl:
    return Systemctl(tmp_path)


async def test_a_unit_is_started_and_takes_nothing_back_that_is_under_way(systemctl: Systemctl) -> None:
    await systemctl.units.start(7)
    assert systemctl.asked == [f"--job-mode=fail start {UNIT}"]


async def test_a_refusal_of_polkit_is_told_with_the_remedy(systemctl: Systemctl) -> None:
    systemctl.does("echo 'Failed to start: Interactive authentication required.\nSee logs.' >&2", 1)
    with pytest.raises(HostError) as caught:
        await systemctl.units.start(7)
    assert str(caught.value) == (
        f"cannot start {UNIT}: Failed to start: Interactive authentication required. See logs.; "
        "is systemd/kvmd.rules in /etc/polkit-1/rules.d?"
    )


async def test_without_systemctl_that_is_said(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"cannot run .*none: No such file or directory"):
        await SystemdUnits([str(tmp_path / "none")]).start(7)


async def test_units_that_run_or_failed_are_known(systemctl: Systemctl) -> None:
    systemctl.does(
        "echo 'kvmd-machine@1.service loaded active running kvmd machine'\n"
        "echo 'kvmd-machine@2.service loaded failed failed kvmd machine'\n"
        "echo 'kvmd-machine@3.service loaded inactive dead kvmd machine'\n"
        "echo 'kvmd-machine@x.service loaded active running'\necho nonsense"
    )
    assert await systemctl.units.taken() == {1, 2}


@pytest.mark.parametrize(
    ("shown", "status", "number", "result"),
    [
        ("ExecMainCode=2\nExecMainStatus=9\nResult=oom-kill", None, 9, "oom-kill"),
        ("ExecMainCode=3\nExecMainStatus=11\nResult=core-dump", None, 11, "core-dump"),
        ("ExecMainCode=1\nExecMainStatus=121\nResult=exit-code", 121, None, "exit-code"),
    ],
)
async def test_how_a_unit_ended(
    systemctl: Systemctl, shown: str, status: int | None, number: int | None, result: str
) -> None:
    systemctl.does(f"cat <<'END'\nInvocationID=abc\nActiveState=failed\nExecMainPID=5\n{shown}\nEND")
    end = await systemctl.units.end_of(UNIT, "abc")
    assert end is not None
    assert (end.pid, end.status, end.signal, end.result) == (5, status, number, result)
    assert await systemctl.units.end_of(UNIT, "another start") is None
    assert await systemctl.units.end_of(UNIT, "") is None


@pytest.mark.parametrize("state", ["active", "activating", "deactivating"])
async def test_one_that_goes_on_has_not_ended(systemctl: Systemctl, state: str) -> None:
    systemctl.does(f"echo InvocationID=abc; echo ActiveState={state}")
    assert await systemctl.units.end_of(UNIT, "abc") is None


async def test_only_machines_units_are_asked_about(systemctl: Systemctl) -> None:
    assert await systemctl.units.end_of("sshd.service", "abc") is None
    assert systemctl.asked == []


async def test_one_that_failed_is_cleared_away(systemctl: Systemctl) -> None:
    systemctl.does("echo failed")
    assert await systemctl.units.clear(7)
    assert systemctl.asked == [f"show --property=ActiveState --value {UNIT}", f"reset-failed {UNIT}"]


async def test_one_that_does_not_end_is_given_up(
    autojump_clock: MockClock,  # noqa: ARG001 - a clock that jumps
) -> None:
    class Endless(SystemdUnits):
        async def _run(self, *arguments: str) -> subprocess.CompletedProcess[bytes]:
            await trio.lowlevel.checkpoint()
            return subprocess.CompletedProcess(arguments, 0, b"active\n", b"")

    assert not await Endless().clear(7)


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cgroup without limits, as that of any process."""
    folder = tmp_path / "cgroup"
    folder.mkdir()
    for name, text in (("memory.max", "max"), ("cpu.max", "max 100000"), ("pids.max", "4352")):
        (folder / name).write_text(f"{text}\n")
    monkeypatch.setattr("kvmd.fleet.units.cgroup_of", lambda _: folder)
    return folder


@pytest.mark.usefixtures("cgroup")
async def test_without_limits_nothing_is_asked(systemctl: Systemctl) -> None:
    await systemctl.units.limit(7, 1, LimitsSpec())
    assert systemctl.asked == []


async def test_limits_are_set_and_looked_at(systemctl: Systemctl, cgroup: Path) -> None:
    systemctl.does(f"cd {cgroup}; echo 100663296 >memory.max; echo '150000 100000' >cpu.max; echo 32 >pids.max")
    await systemctl.units.limit(7, 1, LimitsSpec(memory=96 << 20, cpus=1.5, tasks=32))
    assert systemctl.asked == [f"--runtime set-property {UNIT} MemoryMax=100663296 CPUQuota=150% TasksMax=32"]


async def test_those_of_the_machine_before_are_taken_away(systemctl: Systemctl, cgroup: Path) -> None:
    (cgroup / "memory.max").write_text("100663296\n")
    systemctl.does(f"echo max >{cgroup}/memory.max")
    await systemctl.units.limit(7, 1, LimitsSpec())
    assert systemctl.asked == [f"--runtime set-property {UNIT} MemoryMax=infinity CPUQuota= TasksMax=4352"]


async def test_what_the_kernel_does_not_enforce_is_refused(
    systemctl: Systemctl, cgroup: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvmd.fleet.units._IN_FORCE_SECONDS", 0.0)
    (cgroup / "cpu.max").unlink()
    with pytest.raises(HostError, match=r"does not enforce limits\.cpus \(cpu\.max is none, not 1\.5\): its kernel"):
        await systemctl.units.limit(7, 1, LimitsSpec(cpus=1.5))
