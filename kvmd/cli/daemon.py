"""``kvmd daemon``: looks after machines, each a process of its own, and serves the control API."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import click
import structlog
import trio
from click.core import ParameterSource

from kvmd import log
from kvmd.api.control import ControlApi
from kvmd.cli.check import host_facts
from kvmd.cli.reload import Reloader
from kvmd.console_pump import OutputPump
from kvmd.daemon_config import DaemonConfig, MachinesConfig, load_daemon_config
from kvmd.errors import ConfigError
from kvmd.fleet.daemon import run_daemon
from kvmd.fleet.local import LocalFleet
from kvmd.fleet.unit_pool import UnitPool
from kvmd.fleet.units import SystemdUnits
from kvmd.journal import Journal, is_stderr
from kvmd.log_buffer import LogBuffer
from kvmd.machine_process.cgroup import cgroup_of
from kvmd.nonblocking import NonBlockingWriter, write_within
from kvmd.options import log_options
from kvmd.service_manager import ServiceManager
from kvmd.stop import ExitStatus

CONFIG_FILE = Path("/etc/kvmd/kvmd.toml")
"""Read where it is there and ``--config`` names no other."""

SLICE = "kvmd.slice"
"""A daemon that is in it was started with the units of systemd/, those of machines among them."""

_LAST_WORDS_SECONDS = 1.0


_EPILOG = f"""\b
Exit status: 0 after SIGTERM or SIGINT, or
  {ExitStatus.CONFIG:d}  the command line or the configuration is wrong, or another daemon listens on the socket
  {ExitStatus.HOST:d}  the state folder cannot be used, or another daemon uses it
  {ExitStatus.INTERNAL:d}  a bug of kvmd's
"""


@click.command(epilog=_EPILOG)
@click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    help=f"Who may use the API, and where it listens; by default {CONFIG_FILE}, where it is there.",
)
@click.option(
    "--state",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("/run/kvmd/state"),
    show_default=True,
    help="The folder that knows all machines; made where it is missing.",
)
@click.option(
    "--drain",
    "drain_seconds",
    type=click.FloatRange(0),
    default=10.0,
    show_default=True,
    help="Seconds that clients have at the end (api.drain_seconds may give requests fewer), and after them machines "
    "that are stopped.",
)
@click.option("--stop-machines", is_flag=True, help="Stop all machines at the end; they go on otherwise.")
@log_options
@click.pass_context
def daemon(
    context: click.Context,
    /,
    *,
    config: Path | None,
    state: Path,
    drain_seconds: float,
    stop_machines: bool,
    log_format: log.LogFormat | None,
    log_level: log.LogLevel,
) -> int:
    """Look after machines, and serve the control API, until SIGTERM or SIGINT: docs/daemon.md, docs/api.md."""
    if config is None and CONFIG_FILE.exists():
        config = CONFIG_FILE
    settings = DaemonConfig() if config is None else load_daemon_config(config)
    level_given = context.get_parameter_source("log_level") is not ParameterSource.DEFAULT
    with ExitStack() as stack:
        buffer = LogBuffer(is_terminal=sys.stderr.isatty())
        stack.callback(lambda: write_within(2, buffer.take(), _LAST_WORDS_SECONDS))
        in_journal = log_format is None and is_stderr(os.environ)
        configure_log = partial(
            log.configure,
            log_format=log_format or ("console" if buffer.isatty() else "json"),
            stream=buffer,
            journal=stack.enter_context(Journal()) if in_journal else None,
            journal_only=in_journal,
        )
        configure_log(level=log_level if level_given else settings.log.level)
        stderr = stack.enter_context(NonBlockingWriter.of_fd(2))
        manager = ServiceManager.of_this_process()
        stack.callback(manager.close)
        pool = _pool(settings.machines)
        serving = _Serving(settings, manager)

        def apply(changed: DaemonConfig) -> Sequence[str]:
            if not level_given:
                configure_log(level=changed.log.level)
            if pool is not None:
                pool.set_spare(changed.machines.waiting)
            return ()

        reloader = Reloader(config, settings, manager, (serving.reconfigure, apply))
        folder = state.absolute()

        async def run() -> None:
            pump = OutputPump(buffer, stderr, lambda _: None)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pump.run)
                async with trio.open_nursery() as around:
                    # First of all: a SIGHUP that nobody waits for ends the process.
                    await around.start(reloader.run)
                    try:
                        await run_daemon(
                            folder,
                            serving.serve,
                            drain_seconds=drain_seconds,
                            stop_machines=stop_machines,
                            pool=pool,
                        )
                    finally:
                        pump.end()
                    around.cancel_scope.cancel()

        trio.run(run)
    return 0


def _pool(machines: MachinesConfig) -> UnitPool | None:
    """Return what starts machines in units of their own, or None where the daemon is to start them itself."""
    own = machines.units == "always" or (machines.units == "auto" and SLICE in cgroup_of().parts)
    return UnitPool(SystemdUnits(), Path(machines.socket), machines.waiting) if own else None


class _Serving:
    """The control API over the fleet, and what the service manager is told of it."""

    def __init__(self, config: DaemonConfig, manager: ServiceManager) -> None:
        self._config = config
        self._manager = manager
        self._log = structlog.get_logger("kvmd.daemon")
        self._api: ControlApi | None = None

    def reconfigure(self, config: DaemonConfig) -> Sequence[str]:
        """Take over what can change while it serves, and return the keys that want a restart.

        Raises:
            KvmdError: as ``ControlApi.reconfigure`` does.
        """
        waiting = () if self._api is None else self._api.reconfigure(config)
        self._config = config
        return waiting

    async def serve(self, fleet: LocalFleet, ending: trio.Event) -> None:
        """Serve until the event is set, and drain."""
        api = self._api = ControlApi(self._config, fleet, host_facts(), self._log)
        given = [_listener(name, fd) for name, fd in self._manager.listened.items()]
        async with trio.open_nursery() as nursery:
            await nursery.start(self._until_drained, api, given, nursery.cancel_scope)
            machines = len(fleet.machines())
            self._log.info("api-serving", socket="given" if given else self._config.api.socket)
            self._manager.ready(f"serving {machines} machines")
            if self._manager.watchdog_seconds is not None:
                nursery.start_soon(self._feed_watchdog, api, self._manager.watchdog_seconds)
            await ending.wait()
            self._manager.stopping("draining")
            api.stop()

    async def _until_drained(
        self,
        api: ControlApi,
        given: Sequence[trio.socket.SocketType],
        around: trio.CancelScope,
        *,
        task_status: trio.TaskStatus[None],
    ) -> None:
        await api.serve(given, task_status=task_status)
        around.cancel()

    async def _feed_watchdog(self, api: ControlApi, seconds: float) -> None:
        """Say that the daemon is alive for as long as its loop turns and its API answers."""
        while True:
            with trio.move_on_after(seconds):
                if await api.answers():
                    self._manager.alive()
            await trio.sleep(seconds)


def _listener(name: str, fd: int) -> trio.socket.SocketType:
    """Return the listening socket that systemd handed over.

    Raises:
        ConfigError: it is not a Unix stream socket that listens.
    """
    given = socket.socket(fileno=fd)
    is_ours = given.family == socket.AF_UNIX and given.type == socket.SOCK_STREAM
    if not is_ours or not given.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        given.close()
        raise ConfigError(f"descriptor {fd} ({name}), given by the service manager, is no listening Unix stream socket")
    return trio.socket.from_stdlib_socket(given)
