"""The task that serves a device's queues, from one reset to the next."""

from __future__ import annotations

import structlog
import trio

from kvmd.virtio.activation import Activation
from kvmd.virtio.device import FAILURES_LOGGED, VirtioDevice
from kvmd.virtio.live_queue import QueueStopped

_log = structlog.get_logger(__name__)


async def serve(device: VirtioDevice) -> None:
    """Serve the device until cancelled. What goes wrong within is its failure, never the machine's.

    I/O under way is waited for before the device is served anew, so that writes before a reset do not come after those
    that follow it.
    """
    while True:
        activation = device.activation
        if activation is None:
            await device.changed()
            continue
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_watch, device, activation, nursery.cancel_scope)
                await device.model.run(activation)
        except* QueueStopped:
            await _until_over(device, activation)
        except* Exception as group:  # noqa: BLE001 - one device's end is not the machine's
            if device.failures < FAILURES_LOGGED:
                _log.exception("virtio device failed by a fault of kvmd", device=device.name, exc_info=group)
            device.fail(f"a fault of kvmd: {group.exceptions[0]!r}")


async def _watch(device: VirtioDevice, activation: Activation, scope: trio.CancelScope) -> None:
    await _until_over(device, activation)
    scope.cancel()


async def _until_over(device: VirtioDevice, activation: Activation) -> None:
    while device.activation is activation:
        await device.changed()
