"""What the fleet keeps of one machine."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress

import msgspec
import trio

from kvmd.fleet.base import MachineEnd, MachineInfo, MachineState
from kvmd.machine_process.folder import MachineFolder
from kvmd.machine_process.lifecycle import LifecycleEvent
from kvmd.machine_process.messages import CounterValues


class Entry:
    """One machine of the fleet.

    Attributes:
        info: as it is now.
        folder: its folder, open until the machine is deleted.
        turn: held for an action that changes the state, so that answers come in the order of what was done.
        end_counters: what it did, once it has ended and could say so.
        steps: what became of it, once it has ended.
        killed: whether it was the operator who ended its process.
        deleted: whether it is not in the fleet any more.
    """

    def __init__(self, info: MachineInfo, folder: MachineFolder, pidfd: int) -> None:
        self.info = info
        self.folder = folder
        self.turn = trio.Lock()
        self.end_counters: CounterValues | None = None
        self.steps: list[LifecycleEvent] = []
        self.killed = False
        self.deleted = False
        self._pidfd = pidfd
        self._changed = trio.Event()

    @property
    def name(self) -> str:
        """Its name."""
        return self.info.name

    @property
    def ended(self) -> bool:
        """Whether its process is gone."""
        return self.info.state == "stopped"

    def change(self, state: MachineState, *, started_ns: int | None = None) -> None:
        """Note a state that the machine itself has told."""
        if self.ended:
            return  # its answer was overtaken by its end
        self.info = msgspec.structs.replace(self.info, state=state, started_ns=started_ns or self.info.started_ns)
        self._wake()

    def end(
        self, end: MachineEnd, *, counters: CounterValues | None, steps: list[LifecycleEvent], started_ns: int | None
    ) -> None:
        """Note how it ended, once its process is gone."""
        self.end_counters = counters
        self.steps = steps
        self.info = msgspec.structs.replace(
            self.info, state="stopped", pid=None, end=end, started_ns=started_ns or self.info.started_ns
        )
        self.close_pidfd()
        self._wake()

    def forget(self) -> None:
        """Note that it is deleted, and close everything."""
        self.deleted = True
        self.close()
        self._wake()

    def close(self) -> None:
        """Close what is open."""
        self.close_pidfd()
        self.folder.close()

    def close_pidfd(self) -> None:
        """Close the process's descriptor; harmless the second time."""
        fd, self._pidfd = self._pidfd, -1
        if fd >= 0:
            os.close(fd)

    async def wait_exit(self) -> None:
        """Wait until the process is gone (pidfd_open(2): its descriptor becomes readable)."""
        await trio.lowlevel.wait_readable(self._pidfd)

    def kill(self) -> None:
        """End the process at once; harmless when it is gone."""
        if self._pidfd >= 0:
            self.kill_fd(self._pidfd)

    @staticmethod
    def kill_fd(pidfd: int) -> None:
        """End the process of a descriptor at once; harmless when it is gone."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)

    async def wait(self, holds: Callable[[], bool]) -> None:
        """Wait until ``holds``, or the machine is deleted; it is asked at each change."""
        await trio.lowlevel.checkpoint()
        while not self.deleted and not holds():
            await self._changed.wait()

    def _wake(self) -> None:
        event, self._changed = self._changed, trio.Event()
        event.set()
