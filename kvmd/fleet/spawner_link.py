"""The daemon's side of the spawner: starts it, asks it for processes, hears how they ended."""

from __future__ import annotations

import array
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence

import msgspec
import structlog
import trio

from kvmd.errors import ConfigError, HostError
from kvmd.machine_process.spawning import PACKET_LIMIT, Reaped, Spawn, Spawned
from kvmd.spec.machine import MachineSpec

SPAWNER = (sys.executable, "-P", "-m", "kvmd.machine_process.spawner")
"""The command that starts one: it takes its socket's descriptor as one more argument."""

_log: structlog.stdlib.BoundLogger = structlog.get_logger("kvmd.fleet")


class SpawnerLink:
    """Keeps a spawner at hand; starts another where it was killed: ``kvmd.fleet.parent.Parent``.

    Args:
        command: what starts one.
        reaped: told of each child that ended.
    """

    def __init__(self, command: Sequence[str], reaped: Callable[[Reaped], None]) -> None:
        self._command = command
        self._reaped = reaped
        self._link: trio.socket.SocketType | None = None
        self._number = 0
        self._asked: dict[int, _Asked] = {}
        self._sending = trio.Lock()
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Start a spawner and listen to it until cancelled; it then ends with its last child."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                self._open()
                task_status.started()
                await trio.sleep_forever()
            finally:
                self._nursery = None
                self._hang_up()

    def check(self, spec: MachineSpec) -> None:
        """Refuse limits: a fork is in the cgroup of its parent.

        Raises:
            ConfigError: the spec has some.
        """
        if spec.limits.given:
            raise ConfigError(
                "limits: nothing would enforce them here, since this daemon starts machines itself: run it as "
                "systemd's kvmd.service, which starts each in a unit of its own (docs/daemon.md), or leave [limits] out"
            )

    def adopt(self, unit: str) -> None:
        """Do nothing: no unit is used here."""

    def release(self, unit: str) -> None:
        """Do nothing: see ``adopt``."""

    async def spawn(self, fds: Sequence[int], spec: MachineSpec) -> str:  # noqa: ARG002 - has no limits: see check
        """Fork a process that becomes a machine: ``kvmd.fleet.parent.Parent.spawn``.

        Raises:
            HostError: there is none.
        """
        async with self._sending:
            link = self._link if self._link is not None else self._open()
            self._number += 1
            number = self._number
            packet = msgspec.msgpack.encode(Spawn(number))
            asked = self._asked[number] = _Asked()
            try:
                await link.sendmsg([packet], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
            except BaseException as error:
                del self._asked[number]
                if isinstance(error, OSError | trio.ClosedResourceError):
                    problem = getattr(error, "strerror", None) or "the spawner ended"
                    raise HostError(f"cannot start a process for the machine: {problem}") from error
                raise
        try:
            await asked.answered.wait()
        finally:
            self._asked.pop(number, None)
        if asked.answer is None or asked.answer.problem:
            problem = "the spawner ended" if asked.answer is None else asked.answer.problem
            raise HostError(f"cannot start a process for the machine: {problem}")
        return ""

    def _open(self) -> trio.socket.SocketType:
        if self._nursery is None:
            raise HostError("the fleet is closed")
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its:
            try:
                process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                    [*self._command, str(its.fileno())],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[its.fileno()],
                    cwd="/" if "-P" in self._command else None,
                )
            except OSError as error:
                ours.close()
                raise HostError(f"cannot start the parent of machines: {error.strerror}") from error
        self._link = trio.socket.from_stdlib_socket(ours)
        self._nursery.start_soon(self._listen, self._link)
        self._nursery.start_soon(self._wait_for_fork, process)
        return self._link

    async def _wait_for_fork(self, process: subprocess.Popen[bytes]) -> None:
        """Reap the process that was started: it has imported everything, forked the spawner, and is not needed."""
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(process.wait)

    async def _listen(self, link: trio.socket.SocketType) -> None:
        while True:
            try:
                data = await link.recv(PACKET_LIMIT)
            except OSError:
                data = b""
            if not data:
                break
            message = msgspec.msgpack.decode(data, type=Spawned | Reaped)
            if isinstance(message, Reaped):
                self._reaped(message)
            elif message.number in self._asked:
                asked = self._asked[message.number]
                asked.answer = message
                asked.answered.set()
        if self._link is link:
            _log.error("spawner-died", consequence="another one is started for the next machine")
            self._hang_up()

    def _hang_up(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.close()
        for asked in self._asked.values():
            asked.answered.set()


class _Asked:
    """One request that was not answered yet."""

    def __init__(self) -> None:
        self.answered = trio.Event()
        self.answer: Spawned | None = None
