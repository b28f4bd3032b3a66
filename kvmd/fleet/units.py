"""systemd's units of machines, through ``systemctl``.

Not D-Bus itself: it would be a dependency (jeepney, for example) and a protocol more, and none of these calls is in
the way of a start, since ``kvmd.fleet.unit_pool`` keeps processes waiting; only a machine with limits waits for one.
What the daemon may do to which unit is systemd/kvmd.rules: polkit is asked for each call that changes anything.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import structlog
import trio

from kvmd.errors import HostError
from kvmd.machine_process.cgroup import cgroup_of, lacking_limits, unit_name, unit_number
from kvmd.machine_process.folder import ExitFile
from kvmd.spec.limits import TASKS_LIMIT, LimitsSpec

_IN_FORCE_SECONDS = 5.0
_LOOK_SECONDS = 0.005
_CLEARED_SECONDS = 30.0
_REFUSED = ("Access denied", "authentication")
_PATTERN = "kvmd-machine@*.service"

_CLD_EXITED = "1"
"""ExecMainCode of a process that ended by itself (wait(2)); of others, ExecMainStatus is the signal."""

_log: structlog.stdlib.BoundLogger = structlog.get_logger("kvmd.fleet")


class Units(Protocol):
    """What is asked of systemd: ``SystemdUnits``, and a fake of it in tests."""

    async def taken(self) -> set[int]:
        """Return the numbers of units that run or have failed, whatever is in them."""

    async def start(self, number: int) -> None:
        """Start a unit, and return when its process waits. Raises HostError."""

    def number_of(self, pid: int) -> int | None:
        """Return the number of the unit that a process is in, or None."""

    async def limit(self, number: int, pid: int, limits: LimitsSpec) -> None:
        """See that the limits are in force, and no others. Raises HostError."""

    async def end_of(self, unit: str, invocation: str) -> ExitFile | None:
        """Return how a unit's process ended; None while it has not, or where systemd does not know any more."""

    async def clear(self, number: int) -> bool:
        """Wait until a unit has ended, and have systemd forget that it failed; False where it goes on."""

    async def stop(self, number: int) -> None:
        """Stop a unit, whatever it does."""


class SystemdUnits:
    """``kvmd-machine@N.service``, asked for by ``systemctl``.

    Args:
        systemctl: the command.
    """

    def __init__(self, systemctl: Sequence[str] = ("systemctl",)) -> None:
        self._systemctl = systemctl

    async def taken(self) -> set[int]:
        """Return the numbers of units that run or have failed, whatever is in them."""
        done = await self._run("list-units", "--all", "--plain", "--no-legend", "--full", _PATTERN)
        found = set()
        for line in done.stdout.decode(errors="replace").splitlines():
            name, _, active, *_ = [*line.split(), "", "", ""]
            number = unit_number(name)
            if number is not None and active != "inactive":
                found.add(number)
        return found

    async def start(self, number: int) -> None:
        """Start a unit, and return when its process waits. Raises HostError."""
        # "fail": a start must not take back a stop of the slice that is under way.
        done = await self._run("--job-mode=fail", "start", unit_name(number))
        if done.returncode:
            raise HostError(f"cannot start {unit_name(number)}: {_problem(done)}")

    def number_of(self, pid: int) -> int | None:
        """Return the number of the unit that a process is in, or None."""
        try:
            return unit_number(cgroup_of(pid).name)
        except OSError:
            return None

    async def limit(self, number: int, pid: int, limits: LimitsSpec) -> None:
        """See that the limits are in force, and no others: a number that is used again has those of the last time.

        Raises:
            HostError: they are not.
        """
        try:
            cgroup = cgroup_of(pid)
        except OSError as error:
            raise HostError(f"{unit_name(number)} ended before it was a machine") from error
        if not await self._lacking(limits, cgroup):
            return
        properties = [
            f"MemoryMax={'infinity' if limits.memory is None else limits.memory}",
            f"CPUQuota={'' if limits.cpus is None else f'{limits.cpus * 100:g}%'}",
            f"TasksMax={TASKS_LIMIT if limits.tasks is None else limits.tasks}",
        ]
        done = await self._run("--runtime", "set-property", unit_name(number), *properties)
        if done.returncode:
            raise HostError(f"cannot limit {unit_name(number)}: {_problem(done)}")
        deadline = trio.current_time() + _IN_FORCE_SECONDS
        while lacking := await self._lacking(limits, cgroup):
            if trio.current_time() > deadline:
                raise HostError(
                    f"this host does not enforce {', '.join(lacking)}: its kernel needs the controllers cpu (with "
                    "CONFIG_CFS_BANDWIDTH), memory and pids; or leave the limit out"
                )
            await trio.sleep(_LOOK_SECONDS)

    @staticmethod
    async def _lacking(limits: LimitsSpec, cgroup: Path) -> list[str]:
        await trio.lowlevel.checkpoint()
        return lacking_limits(limits, cgroup, exactly=True)

    async def end_of(self, unit: str, invocation: str) -> ExitFile | None:
        """Return how a unit's process ended; None while it has not, or where systemd does not know any more."""
        if unit_number(unit) is None:
            return None
        names = "InvocationID,ActiveState,Result,ExecMainPID,ExecMainCode,ExecMainStatus"
        done = await self._run("show", f"--property={names}", unit)
        shown = dict(line.partition("=")[::2] for line in done.stdout.decode(errors="replace").splitlines())
        if not invocation or shown.get("InvocationID") != invocation:
            return None
        if shown.get("ActiveState") not in {"inactive", "failed"}:
            return None
        return _exit_of(shown)

    async def clear(self, number: int) -> bool:
        """Wait until a unit has ended, and have systemd forget that it failed; False where it goes on."""
        with trio.move_on_after(_CLEARED_SECONDS):
            wait = _LOOK_SECONDS
            while True:
                done = await self._run("show", "--property=ActiveState", "--value", unit_name(number))
                state = done.stdout.decode(errors="replace").strip()
                if state == "failed":
                    done = await self._run("reset-failed", unit_name(number))
                    if done.returncode:
                        _log.warning("unit-not-reset", unit=unit_name(number), problem=_problem(done))
                if state in {"failed", "inactive"}:
                    return True
                wait = min(2 * wait, 1.0)
                await trio.sleep(wait)
        return False

    async def stop(self, number: int) -> None:
        """Stop a unit, whatever it does."""
        done = await self._run("--no-block", "stop", unit_name(number))
        if done.returncode:
            _log.warning("unit-not-stopped", unit=unit_name(number), problem=_problem(done))

    async def _run(self, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        command = [*self._systemctl, "--no-ask-password", "--no-pager", *arguments]
        try:
            return await trio.run_process(
                command, capture_stdout=True, capture_stderr=True, check=False, env=_plain(os.environ)
            )
        except OSError as error:
            raise HostError(f"cannot run {self._systemctl[0]}: {error.strerror}") from error


def _exit_of(shown: Mapping[str, str]) -> ExitFile:
    def number(name: str) -> int:
        text = shown.get(name, "")
        return int(text) if text.isascii() and text.isdigit() else 0

    by_itself = shown.get("ExecMainCode") == _CLD_EXITED
    status = number("ExecMainStatus")
    result = shown.get("Result", "")
    return ExitFile(
        number("ExecMainPID"), status if by_itself else None, None if by_itself else status, time.time_ns(), result
    )


def _problem(done: subprocess.CompletedProcess[bytes]) -> str:
    text = " ".join(done.stderr.decode(errors="replace").split()) or f"systemctl ended with status {done.returncode}"
    if any(word in text for word in _REFUSED):
        text += "; is systemd/kvmd.rules in /etc/polkit-1/rules.d?"
    return text


def _plain(environment: Mapping[str, str]) -> dict[str, str]:
    return {**environment, "LC_ALL": "C", "SYSTEMD_COLORS": "0", "SYSTEMD_LOG_TARGET": "console"}
