"""The API as the daemon runs it: made of its configuration, on sockets of its own or on those that it was given."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import structlog
import trio

from kvmd.api.access import AccessRules, Role
from kvmd.api.app import make_app
from kvmd.api.models import HostFacts
from kvmd.api.server.limits import Limits
from kvmd.api.server.listen import give, listening
from kvmd.api.server.peer import Peer
from kvmd.api.server.server import Server
from kvmd.api.services import ServerFigures, Services
from kvmd.daemon_config import DaemonConfig, group_id
from kvmd.fleet.base import Fleet

_QUESTION = b"GET /v1/machines HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


class ControlApi:
    """The control API of one daemon.

    Args:
        config: who may use it, and where.
        fleet: the machines.
        host: what ``kvmd check --json`` says.
        log: told of bugs and shortages.

    Raises:
        ConfigError: the configuration names a group that there is not.
    """

    def __init__(
        self,
        config: DaemonConfig,
        fleet: Fleet,
        host: Mapping[str, object],
        log: structlog.typing.FilteringBoundLogger | None = None,
    ) -> None:
        self._config = config.api
        self._path = config.api.socket
        self._rules, self._operators, self._viewers = _rules(config)
        self._listens = False
        self._services = Services(fleet=fleet, host=HostFacts.model_validate(host), figures=self._figures)
        self._allow(config)
        self._gate = make_app(self._services, self._rules)
        self._server = Server(self._gate, limits=_limits(config), log=log)

    def reconfigure(self, config: DaemonConfig) -> list[str]:
        """Take over what a running API can, and return the keys that want a restart.

        A role that somebody has lost is refused from the next request on, on open connections too; streams that were
        let through go on.

        Raises:
            ConfigError: the configuration names a group that there is not. All is as before.
            HostError: a socket cannot be given to a group. All is as before.
        """
        rules, operators, viewers = _rules(config)
        if self._listens:
            give(Path(self._config.socket), operators)
            if self._viewers is not None:
                give(Path(self._config.viewers_socket), viewers)
        self._gate.rules = rules
        self._allow(config)
        self._server.set_limits(_limits(config))
        return ["api.viewers"] if self._listens and self._viewers is None and viewers is not None else []

    def role_of(self, peer: Peer) -> Role | None:
        """Return what a peer may do now, or None for strangers."""
        return self._gate.rules.role_of(peer)

    def _allow(self, config: DaemonConfig) -> None:
        services = self._services
        services.image_folders = [Path(folder) for folder in config.images.folders]
        services.disk_folders = [Path(folder) for folder in config.disks.folders]
        services.bridges = config.networks.bridges
        services.namespaces = config.networks.namespaces

    async def serve(
        self,
        given: Sequence[trio.socket.SocketType] = (),
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve until ``stop``, and drain.

        Args:
            given: listening sockets of somebody else's, such as systemd's, in place of those of the configuration.
            task_status: told once connections are taken.

        Raises:
            ConfigError: another daemon listens, or a path is no place for a socket.
            HostError: a socket cannot be made.
        """
        with ExitStack() as stack:
            listeners = list(given)
            if listeners:
                self._path = listeners[0].getsockname()
            if not listeners:
                self._listens = True
                listeners.append(stack.enter_context(listening(Path(self._config.socket), group=self._operators)))
                if self._viewers is not None:
                    path = Path(self._config.viewers_socket)
                    listeners.append(stack.enter_context(listening(path, group=self._viewers)))
            await self._server.serve(listeners, task_status=task_status)

    async def answers(self) -> bool:
        """Tell whether a client of this process's own user gets the list of machines. The caller sets the deadline.

        That all connections are in use is an answer, too: clients have them, and a new daemon would be no better off.
        """
        try:
            async with await trio.open_unix_socket(self._path) as stream:
                await stream.send_all(_QUESTION)
                answer = b""
                while b"\r\n" not in answer:
                    more = await stream.receive_some()
                    if not more:
                        break
                    answer += more
        except (OSError, trio.BrokenResourceError):
            return False
        return answer.startswith((b"HTTP/1.1 200 ", b"HTTP/1.1 503 "))

    def stop(self) -> None:
        """Let ``serve`` return, at the latest after the drain deadline."""
        self._server.stop()

    def _figures(self) -> ServerFigures:
        server = self._server
        return ServerFigures(server.open_connections, server.accepted, server.refused)


def _rules(config: DaemonConfig) -> tuple[AccessRules, int | None, int | None]:
    """Return the rules, and the groups of operators and viewers in them.

    Raises:
        ConfigError: there is no such group.
    """
    operators = group_id("api.operators", config.api.operators)
    viewers = group_id("api.viewers", config.api.viewers)
    return AccessRules(own_uid=os.geteuid(), operators=operators, viewers=viewers), operators, viewers


def _limits(config: DaemonConfig) -> Limits:
    return Limits(
        connections=config.api.connections,
        connections_per_user=config.api.connections_per_user,
        drain_seconds=config.api.drain_seconds,
    )
