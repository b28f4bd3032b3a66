"""SIGHUP: the daemon reads its configuration again, and takes over what it can without a restart."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import structlog
import trio

from kvmd.daemon_config import DaemonConfig, load_daemon_config, need_restart
from kvmd.errors import KvmdError
from kvmd.service_manager import ServiceManager


class Reloader:
    """Reloads at SIGHUP.

    Args:
        path: the configuration's file; without one there is nothing to read again.
        config: what it said at the start.
        manager: told when a reload begins, and when it is done.
        apply: called with what the file says now, in order; each returns the keys that it could not take over. The
            first may raise KvmdError where what it says cannot be, and changes nothing then.
    """

    def __init__(
        self,
        path: Path | None,
        config: DaemonConfig,
        manager: ServiceManager,
        apply: Sequence[Callable[[DaemonConfig], Sequence[str]]],
    ) -> None:
        self._path = path
        self._started_with = config
        self._manager = manager
        self._apply = apply
        self._log = structlog.get_logger("kvmd.daemon")

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Reload at each SIGHUP until cancelled."""
        with trio.open_signal_receiver(signal.SIGHUP) as received:
            task_status.started()
            async for _ in received:
                self.reload()

    def reload(self) -> None:
        """Read the file again. What it says is taken over as a whole, or not at all where it cannot be meant."""
        self._manager.reloading()
        try:
            config = DaemonConfig() if self._path is None else load_daemon_config(self._path)
            waiting = need_restart(self._started_with, config)
            for apply in self._apply:
                waiting += apply(config)
        except KvmdError as error:
            self._log.error("configuration-not-reloaded", problem=str(error), consequence="it stays as it was")
            self._manager.ready(f"configuration not reloaded: {error}")
            return
        if waiting:
            self._log.warning("restart-needed", keys=waiting, consequence="the rest is in force")
        self._log.info("configuration-reloaded", file=None if self._path is None else str(self._path))
        self._manager.ready(f"configuration reloaded; {len(waiting)} keys wait for a restart")
