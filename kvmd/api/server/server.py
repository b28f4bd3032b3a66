"""The server: takes connections, bounds them, and stops within a deadline."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Sequence

import h11
import structlog
import trio

from kvmd.api.problems import Problem, ProblemType
from kvmd.api.server.asgi import App
from kvmd.api.server.connection import Connection, refusal
from kvmd.api.server.limits import Limits
from kvmd.api.server.peer import Peer, peer_of
from kvmd.api.server.wire import Wire

REFUSALS_LIMIT = 64
"""Connections beyond the bound that are told so at the same time; those beyond these are closed without a word."""

_RETRY_SECONDS = 0.1
"""How long nothing is accepted where this process or the host is out of descriptors or memory."""

_PASSING = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})


class Server:
    """Serves an app on listening Unix sockets.

    Attributes:
        accepted: connections so far.
        refused: connections so far that were beyond a bound.

    Args:
        app: answers requests.
        limits: bounds on clients.
        log: told of bugs and shortages.
    """

    def __init__(
        self, app: App, *, limits: Limits | None = None, log: structlog.typing.FilteringBoundLogger | None = None
    ) -> None:
        self._app = app
        self._limits = limits or Limits()
        self._log = log or structlog.get_logger()
        self._connections: set[Connection] = set()
        self._users: Counter[int] = Counter()
        self._unbounded_users = {0, os.geteuid()}
        self._refusing = 0
        self._draining = trio.Event()
        self._accepting = trio.CancelScope()
        self.accepted = 0
        self.refused = 0

    @property
    def open_connections(self) -> int:
        """How many there are now."""
        return len(self._connections)

    def set_limits(self, limits: Limits) -> None:
        """Bound connections so from now on; those that are open keep the bounds of requests that they had."""
        self._limits = limits

    def stop(self) -> None:
        """Let ``serve`` return: at once where nobody waits for anything, at the latest at the drain deadline."""
        self._draining.set()
        for connection in self._connections:
            connection.drain()
        self._accepting.cancel()

    async def serve(
        self,
        listeners: Sequence[trio.socket.SocketType],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve until ``stop`` was called, then drain: see ``Limits.drain_seconds``.

        Args:
            listeners: bound and listening; closed by their owner.
            task_status: told once connections are taken.
        """
        async with trio.open_nursery() as clients:
            with self._accepting:
                async with trio.open_nursery() as accepting:
                    for listener in listeners:
                        accepting.start_soon(self._accept, listener, clients)
                    task_status.started()
            clients.cancel_scope.deadline = trio.current_time() + self._limits.drain_seconds

    async def _accept(self, listener: trio.socket.SocketType, clients: trio.Nursery) -> None:
        while True:
            try:
                accepted, _ = await listener.accept()
            except OSError as error:
                if error.errno not in _PASSING:
                    raise
                self._log.warning("api-cannot-accept", problem=error.strerror)
                await trio.sleep(_RETRY_SECONDS)
                continue
            self.accepted += 1
            self._take(accepted, clients)

    def _take(self, accepted: trio.socket.SocketType, clients: trio.Nursery) -> None:
        try:
            peer = peer_of(accepted)
        except OSError:
            accepted.close()
            return
        wire = Wire(accepted)
        problem = self._too_many(peer)
        if problem is None:
            connection = Connection(self._app, wire, peer, limits=self._limits, draining=self._draining, log=self._log)
            # Counted now and not when the task first runs: a thousand may be accepted before that.
            self._connections.add(connection)
            self._users[peer.uid] += 1
            clients.start_soon(self._serve_one, connection, peer)
            return
        self.refused += 1
        if self._refusing < REFUSALS_LIMIT:
            self._refusing += 1
            clients.start_soon(self._refuse_one, wire, problem)
        else:
            wire.close()

    def _too_many(self, peer: Peer) -> Problem | None:
        limits = self._limits
        if len(self._connections) >= limits.connections:
            detail = f"all {limits.connections} connections are in use"
        elif self._users[peer.uid] >= limits.connections_per_user and peer.uid not in self._unbounded_users:
            detail = f"user {peer.uid} has {limits.connections_per_user} connections already"
        else:
            return None
        return Problem(ProblemType.TOO_MANY_CONNECTIONS, detail, headers=((b"retry-after", b"1"),))

    async def _serve_one(self, connection: Connection, peer: Peer) -> None:
        try:
            await connection.run()
        finally:
            self._connections.discard(connection)
            self._users[peer.uid] -= 1
            if not self._users[peer.uid]:
                del self._users[peer.uid]

    async def _refuse_one(self, wire: Wire, problem: Problem) -> None:
        try:
            with trio.move_on_after(self._limits.linger_seconds):
                await wire.send(refusal(h11.Connection(h11.SERVER), problem))
                await wire.linger(self._limits.linger_seconds)
        finally:
            self._refusing -= 1
            wire.close()
