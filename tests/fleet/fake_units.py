"""systemd's units without systemd: processes, and what would be known of them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import trio

from kvmd.errors import HostError
from kvmd.machine_process.cgroup import unit_number
from kvmd.machine_process.folder import ExitFile
from kvmd.spec.limits import LimitsSpec

PROCESS = Path(__file__).with_name("waiting_process.py")


class FakeUnits:
    """Starts processes that wait: ``kvmd.fleet.units.Units``.

    Attributes:
        problem: why none can be started.
        limited: the limits that were asked for, by number.
        results: what a unit that was ended by a signal is said to have failed with.
        started, cleared: numbers, in order.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problem = ""
        self.unlimited = ""
        self.limited: dict[int, LimitsSpec] = {}
        self.result = "signal"
        self.started: list[int] = []
        self.cleared: list[int] = []
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self._invocations = 0

    async def taken(self) -> set[int]:
        await trio.lowlevel.checkpoint()
        return {number for number, process in self.processes.items() if process.poll() is None}

    async def start(self, number: int) -> None:
        await trio.lowlevel.checkpoint()
        if self.problem:
            raise HostError(self.problem)
        self._invocations += 1
        self.started.append(number)
        self.processes[number] = subprocess.Popen(  # noqa: ASYNC220, S603 - our own interpreter and script
            [sys.executable, str(PROCESS), str(self.path)],
            env={**os.environ, "INVOCATION_ID": f"{number}-{self._invocations}"},
        )

    def number_of(self, pid: int) -> int | None:
        return next((number for number, process in self.processes.items() if process.pid == pid), None)

    async def limit(self, number: int, pid: int, limits: LimitsSpec) -> None:
        await trio.lowlevel.checkpoint()
        assert self.processes[number].pid == pid
        if self.unlimited:
            raise HostError(self.unlimited)
        self.limited[number] = limits

    async def end_of(self, unit: str, invocation: str) -> ExitFile | None:
        await trio.lowlevel.checkpoint()
        process = self.processes[unit_number(unit) or 0]
        code = process.poll()
        if code is None or not invocation.startswith(f"{unit_number(unit)}-"):
            return None
        result = self.result if code < 0 else "exit-code"
        status, signal = (code, None) if code >= 0 else (None, -code)
        return ExitFile(process.pid, status, signal, time.time_ns(), result)

    async def clear(self, number: int) -> bool:
        process = self.processes[number]
        await trio.to_thread.run_sync(process.wait, abandon_on_cancel=True)
        self.cleared.append(number)
        return True

    async def stop(self, number: int) -> None:
        await trio.lowlevel.checkpoint()
        self.processes[number].terminate()
