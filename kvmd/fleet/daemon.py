"""The life of the daemon: it takes its machines over, serves, drains, and leaves them running or stops them all."""

from __future__ import annotations

import math
import resource
import signal
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import structlog
import trio

from kvmd.fleet.leftovers import remove_leftovers
from kvmd.fleet.local import LocalFleet, open_fleet
from kvmd.fleet.spawner_link import SPAWNER
from kvmd.fleet.unit_pool import UnitPool

Serve = Callable[[LocalFleet, trio.Event], Awaitable[None]]
"""Answers clients until the event is set; then it has ``drain_seconds`` to finish what it began, and is cancelled."""

_log: structlog.stdlib.BoundLogger = structlog.get_logger("kvmd.daemon")


async def run_daemon(
    state: Path,
    serve: Serve,
    *,
    drain_seconds: float,
    stop_machines: bool,
    spawner: Sequence[str] = SPAWNER,
    pool: UnitPool | None = None,
) -> None:
    """Run until SIGTERM or SIGINT.

    Args:
        state: the state folder.
        serve: see ``Serve``; when it returns by itself, the daemon ends too.
        drain_seconds: how long clients, and after them machines that are stopped, have to come to an end; Linux guests
            have ``SHUTDOWN_SECONDS`` before it to shut down.
        stop_machines: stop all machines at the end, instead of leaving them for the next daemon.
        spawner: the command of the machines' parent, where there is no ``pool``.
        pool: starts machines in systemd units of their own.

    Raises:
        HostError: the state folder cannot be used, or another daemon uses it.
    """
    # Two descriptors a machine, and some a client.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    # Of machines that died without a daemon to see it.
    await remove_leftovers()
    async with open_fleet(state, spawner=spawner, pool=pool) as fleet:
        _log.info("daemon-started", state=str(state), machines=len(fleet.machines()))
        ending, hurry = trio.Event(), trio.Event()
        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as serving:
                nursery.start_soon(_watch_signals, ending, hurry, serving, drain_seconds)
                await serve(fleet, ending)
            if serving.cancelled_caught:
                _log.warning("clients-cut-off", after_seconds=drain_seconds)
            if stop_machines:
                await fleet.stop_all(drain_seconds, hurry=hurry)
            nursery.cancel_scope.cancel()
        left = sum(machine.end is None for machine in fleet.machines())
        _log.info("daemon-stopped", machines_running=left)


async def _watch_signals(
    ending: trio.Event, hurry: trio.Event, serving: trio.CancelScope, drain_seconds: float
) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as received:
        async for number in received:
            _log.info("daemon-stopping", signal=signal.Signals(number).name)
            if ending.is_set():
                # The second signal is impatient.
                hurry.set()
                serving.deadline = -math.inf
            else:
                ending.set()
                serving.deadline = trio.current_time() + drain_seconds
