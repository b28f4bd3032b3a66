"""A daemon whose machines become of processes that wait, as under systemd, without one.

``kvmd.benchmark.post`` starts it as ``python -m kvmd.benchmark.waiting FOLDER``. What systemd does before anybody asks,
starting a process that imports everything and waits, ``_Processes`` does here; from a POST on all is as it is there,
but for limits, which these machines have none of.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import trio

from kvmd.api.control import ControlApi
from kvmd.daemon_config import ApiConfig, DaemonConfig, MachinesConfig
from kvmd.errors import HostError
from kvmd.fleet.daemon import run_daemon
from kvmd.fleet.local import LocalFleet
from kvmd.fleet.unit_pool import UnitPool
from kvmd.machine_process.folder import ExitFile
from kvmd.spec.limits import LimitsSpec

SERVING = b"serving"
_SPARE = 2
_DRAIN_SECONDS = 5.0


class _Processes:
    """Processes in place of systemd's units: ``kvmd.fleet.units.Units``.

    Args:
        path: where they are to wait.
    """

    def __init__(self, path: Path) -> None:
        self._command = [sys.executable, "-P", "-m", "kvmd", "machine-process", "--wait-at", str(path)]
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    async def taken(self) -> set[int]:
        """Return none."""
        await trio.lowlevel.checkpoint()
        return set()

    async def start(self, number: int) -> None:
        """Start one."""
        await trio.lowlevel.checkpoint()
        own = {**os.environ, "INVOCATION_ID": str(number)}
        self._processes[number] = subprocess.Popen(self._command, env=own)  # noqa: ASYNC220 - nobody waits for it here

    def number_of(self, pid: int) -> int | None:
        """Return the number of a process."""
        return next((number for number, process in self._processes.items() if process.pid == pid), None)

    async def limit(self, number: int, pid: int, limits: LimitsSpec) -> None:
        """See that there are no limits to be enforced."""
        await trio.lowlevel.checkpoint()
        del pid
        if limits.given:
            raise HostError(f"process {number} is in no unit that could have limits")

    async def end_of(self, unit: str, invocation: str) -> ExitFile | None:
        """Know nothing of ends but what machines write down."""
        await trio.lowlevel.checkpoint()
        del unit, invocation
        return None

    async def clear(self, number: int) -> bool:
        """Wait for a process's end."""
        await trio.to_thread.run_sync(self._processes[number].wait, abandon_on_cancel=True)
        del self._processes[number]
        return True

    async def stop(self, number: int) -> None:
        """End a process."""
        await trio.lowlevel.checkpoint()
        self._processes[number].terminate()


def main() -> None:
    """Be the daemon in a folder, until SIGTERM."""
    folder = Path(sys.argv[1])
    path = folder / "machines"
    config = DaemonConfig(api=ApiConfig(socket=str(folder / "api")), machines=MachinesConfig(socket=str(path)))

    async def serve(fleet: LocalFleet, ending: trio.Event) -> None:
        api = ControlApi(config, fleet, {"usable": True})
        async with trio.open_nursery() as nursery:
            await nursery.start(api.serve)
            os.write(2, SERVING + b"\n")
            await ending.wait()
            api.stop()

    pool = UnitPool(_Processes(path), path, _SPARE)
    trio.run(lambda: run_daemon(folder / "state", serve, drain_seconds=_DRAIN_SECONDS, stop_machines=True, pool=pool))


if __name__ == "__main__":
    main()
