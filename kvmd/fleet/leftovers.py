"""What machines leave of the host's network when they cannot remove it themselves, removed by the daemon."""

from __future__ import annotations

import structlog
import trio

from kvmd.errors import HostError
from kvmd.network.left_behind import remove_left_behind
from kvmd.spec.machine import MachineSpec

_ONE_AT_A_TIME = trio.CapacityLimiter(1)
"""Removing holds a lock of the host's; who waits for it here does not do so by looking again and again."""

_log: structlog.stdlib.BoundLogger = structlog.get_logger("kvmd.daemon")


def outlives(spec: MachineSpec) -> bool:
    """Tell whether a machine has anything that its process's end does not take with it: docs/network.md."""
    return any(network.kind != "bridge" for network in spec.networks)


async def remove_leftovers() -> None:
    """Remove the bridges and network namespaces that nobody uses; what cannot be is logged, and stays."""
    try:
        for what in await trio.to_thread.run_sync(remove_left_behind, limiter=_ONE_AT_A_TIME):
            _log.warning("network-left-behind-removed", what=what)
    except (HostError, RuntimeError) as error:  # RuntimeError: no thread for it
        _log.warning("network-left-behind", problem=str(error), consequence="it stays until the next start")
