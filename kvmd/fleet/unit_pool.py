"""Machines' processes in systemd units of their own, some of them kept waiting for a machine.

A unit's process imports everything, connects to the daemon's socket and waits (``kvmd.machine_process.waiting``): what
would take a third of a second is done before anybody asks. Then it is given the machine's descriptors, with the limits
of the machine's spec in force on its cgroup before. It is systemd's child and in a cgroup of its own: the daemon's end
does nothing to it. Those that still wait end with the daemon, since the next one may be another version.
"""

from __future__ import annotations

import array
import math
import os
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
import structlog
import trio

from kvmd import __version__
from kvmd.errors import HostError, KvmdError
from kvmd.fleet.pool_plan import PoolPlan
from kvmd.fleet.units import Units
from kvmd.machine_process.cgroup import unit_name, unit_number
from kvmd.machine_process.spawning import PACKET_LIMIT, Become, Waiting
from kvmd.spec.machine import MachineSpec

_BACKLOG = 128
_PEER = struct.Struct("iii")
"""struct ucred: pid, uid, gid (unix(7))."""

_COME_SECONDS = 600.0
"""How long a process may take from its unit's start to its first word. The unit's own TimeoutStartSec= is what counts;
this is for a systemd that does not answer."""

_AGAIN_SECONDS = 5.0
"""After a unit that did not start, or ended while it waited, before another is started that nobody has asked for."""

_REFILL_SECONDS = 0.5
"""From a creation to the start of the process that waits in the place of the one it took: the imports of that one would
take the processors from the new machine, just while somebody waits for its first instruction."""

_TRIES = 3
_SAY_SECONDS = 10.0

_log: structlog.stdlib.BoundLogger = structlog.get_logger("kvmd.fleet")


class UnitPool:
    """Keeps processes waiting, and makes machines of them: ``kvmd.fleet.parent.Parent``.

    Args:
        units: systemd's.
        path: where the processes connect to.
        spare: how many to keep waiting; with none, who creates a machine waits for a process's start.
    """

    def __init__(self, units: Units, path: Path, spare: int) -> None:
        self._units = units
        self._path = path
        self._plan = PoolPlan(spare, most_starting=max(2, 2 * (os.cpu_count() or 1)))
        self._connected: dict[int, _Connection] = {}
        self._came: dict[int, trio.Event] = {}
        self._failed: HostError | None = None
        self._failures = 0
        self._refill_at = -math.inf
        self._changed = trio.Event()
        self._nursery: trio.Nursery | None = None

    @property
    def waiting(self) -> int:
        """Processes that wait for a machine now."""
        return self._plan.waiting

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep processes waiting until cancelled; machines go on, those that wait end.

        Raises:
            HostError: the socket cannot be made.
        """
        listener = _listen(self._path)
        try:
            strangers = {number for number in await self._taken() if self._plan.use(number)}
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                for number in strangers:
                    # Most likely processes that waited for the daemon before this one.
                    nursery.start_soon(self._clear, number)
                nursery.start_soon(self._accept, listener, nursery)
                nursery.start_soon(self._keep, nursery)
                task_status.started()
        finally:
            self._nursery = None
            listener.close()
            with suppress(OSError):
                self._path.unlink()
            for connection in self._connected.values():
                connection.close()

    def check(self, spec: MachineSpec) -> None:
        """Any limits can be enforced."""

    async def spawn(self, fds: Sequence[int], spec: MachineSpec) -> str:
        """Make a machine of a process that waits, and return the name of its unit.

        Raises:
            HostError: there is none, or its limits cannot be enforced.
        """
        for _ in range(_TRIES):
            connection = await self._take()
            try:
                await self._units.limit(connection.number, connection.pid, spec.limits)
                await connection.become(Become(unit_name(connection.number), spec.name), fds)
            except OSError:
                self._discard(connection)
                continue  # it was gone when it should have become one
            except BaseException:
                self._discard(connection)
                raise
            connection.close()
            return unit_name(connection.number)
        raise HostError(f"{_TRIES} processes ended before they were machines: see `journalctl -u 'kvmd-machine@*'`")

    def adopt(self, unit: str) -> None:
        """Leave the unit alone: a machine of an earlier daemon is in it."""
        number = unit_number(unit)
        if number is not None:
            self._plan.use(number)

    def release(self, unit: str) -> None:
        """Clear away the unit of a process that has ended, or is about to."""
        number = unit_number(unit)
        if number is not None and self._nursery is not None:
            self._nursery.start_soon(self._clear, number)

    def set_spare(self, spare: int) -> None:
        """Keep as many waiting from now on."""
        self._plan.spare = spare
        while (number := self._plan.surplus()) is not None:
            self._discard(self._connected[number])
        self._wake()

    # -- inside

    async def _taken(self) -> set[int]:
        try:
            return await self._units.taken()
        except HostError as error:
            _log.error("units-unusable", problem=str(error))
            return set()

    async def _take(self) -> _Connection:
        failures = self._failures
        self._plan.ask()
        self._wake()
        try:
            while True:
                number = self._plan.take()
                if number is not None:
                    if self._refill_at == -math.inf:
                        self._refill_at = trio.current_time() + _REFILL_SECONDS
                    self._wake()
                    connection = self._connected[number]
                    connection.watched.cancel()
                    return connection
                if self._failures != failures and self._failed is not None:
                    raise self._failed
                await self._changed.wait()
        finally:
            self._plan.give_up()

    def _discard(self, connection: _Connection) -> None:
        """Let go of a process that is to end, and of its unit when that has."""
        connection.watched.cancel()
        connection.close()
        self._connected.pop(connection.number, None)
        self.release(unit_name(connection.number))

    async def _keep(self, nursery: trio.Nursery) -> None:
        """Start units whenever there are too few."""
        while True:
            refill_at = self._refill_at
            calm = trio.current_time() >= refill_at
            if calm:
                self._refill_at = -math.inf
            while (number := self._plan.start_one(spares=calm)) is not None:
                nursery.start_soon(self._start, number)
            with trio.move_on_at(math.inf if calm else refill_at):
                await self._changed.wait()

    async def _start(self, number: int) -> None:
        came = self._came[number] = trio.Event()
        problem = f"{unit_name(number)} did not come within {_COME_SECONDS:.0f} s"
        with trio.move_on_after(_COME_SECONDS) as patience:
            try:
                await self._units.start(number)
                # It has said that it is ready after it connected; only our own accept may be behind.
                await came.wait()
            except HostError as error:
                problem = str(error)
            else:
                return
        if patience.cancelled_caught:
            await self._units.stop(number)
        self._plan.lost(number)
        self._failed = HostError(problem)
        self._failures += 1
        _log.error("unit-not-started", unit=unit_name(number), problem=problem)
        self._wake()
        await trio.sleep(_AGAIN_SECONDS)
        await self._clear(number)

    async def _clear(self, number: int) -> None:
        try:
            if not await self._units.clear(number):
                _log.warning("unit-goes-on", unit=unit_name(number), consequence="its number is not used again")
                return
        except HostError as error:
            _log.error("unit-not-reset", unit=unit_name(number), problem=str(error))
        self._connected.pop(number, None)
        self._plan.free(number)
        self._wake()

    async def _accept(self, listener: trio.socket.SocketType, nursery: trio.Nursery) -> None:
        while True:
            try:
                accepted, _ = await listener.accept()
            except OSError as error:
                _log.warning("unit-connection-refused", problem=error.strerror)
                await trio.sleep(_AGAIN_SECONDS)
                continue
            nursery.start_soon(self._welcome, accepted)

    async def _welcome(self, accepted: trio.socket.SocketType) -> None:
        try:
            connection = await self._greeted(accepted)
        except (KvmdError, OSError) as error:
            accepted.close()
            _log.warning("unit-connection-refused", problem=str(error))
            return
        except BaseException:
            accepted.close()
            raise
        number = connection.number
        self._connected[number] = connection
        self._came[number].set()
        self._wake()
        with connection.watched:
            # It has nothing more to say: what can be read is its end.
            await trio.lowlevel.wait_readable(connection.socket)
        if not connection.watched.cancel_called:
            _log.warning("waiting-process-ended", unit=unit_name(number))
            self._plan.lost(number)
            connection.close()
            await trio.sleep(_AGAIN_SECONDS)
            await self._clear(number)

    async def _greeted(self, accepted: trio.socket.SocketType) -> _Connection:
        pid, uid, _ = _PEER.unpack(accepted.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
        number = self._units.number_of(pid)
        if uid not in {os.geteuid(), 0} or number is None:
            raise HostError(f"process {pid} of user {uid} is in no unit of a machine")
        with trio.move_on_after(_SAY_SECONDS):
            try:
                said = msgspec.msgpack.decode(await accepted.recv(PACKET_LIMIT), type=Waiting)
            except msgspec.MsgspecError as error:
                raise HostError(f"{unit_name(number)} says something else than that it waits") from error
            if said.version != __version__:
                raise HostError(
                    f"{unit_name(number)} is kvmd {said.version}, and this daemon {__version__}: restart the daemon"
                )
            if not self._plan.came(number):
                raise HostError(f"nobody has asked for {unit_name(number)}")
            return _Connection(accepted, number, pid)
        raise HostError(f"{unit_name(number)} does not say that it waits")

    def _wake(self) -> None:
        event, self._changed = self._changed, trio.Event()
        event.set()


class _Connection:
    """A process that waits."""

    def __init__(self, socket_: trio.socket.SocketType, number: int, pid: int) -> None:
        self.socket = socket_
        self.number = number
        self.pid = pid
        self.watched = trio.CancelScope()

    async def become(self, become: Become, fds: Sequence[int]) -> None:
        """Make it a machine. Raises OSError where it is gone."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        await self.socket.sendmsg([msgspec.msgpack.encode(become)], rights)

    def close(self) -> None:
        """Hang up; harmless the second time."""
        self.socket.close()


def _listen(path: Path) -> trio.socket.SocketType:
    """Return a socket for processes of this user only. The state folder's lock keeps a second daemon away from it."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        with suppress(FileNotFoundError):
            path.unlink()
        before = os.umask(0o177)
        try:
            listening.bind(str(path))
        finally:
            os.umask(before)
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        raise HostError(f"cannot listen at {path} for machines' processes: {error.strerror}") from error
    return trio.socket.from_stdlib_socket(listening)
