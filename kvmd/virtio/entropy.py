"""The virtio entropy device: clause 5.4 of virtio 1.2."""

from __future__ import annotations

import os

import trio

from kvmd.virtio.abi import DeviceId
from kvmd.virtio.activation import Activation
from kvmd.virtio.device_model import PlainModel
from kvmd.virtio.memory import scatter, total_bytes
from kvmd.virtio.split_queue import QueueError

QUEUE_SIZE = 64

ANSWER_BYTES = 4096
"""Given for one request at most, however large its buffer is. Linux asks for 64 bytes."""

BATCH = 16
"""Requests answered before others have the event loop again: some 150 microseconds of generating. No other limit is
needed: the host's generator does not run dry, and a guest that asks for ever has its turn like any other task."""


class EntropyDevice(PlainModel):
    """Random bytes from the host's generator (getrandom)."""

    device_id = DeviceId.ENTROPY
    queue_sizes = (QUEUE_SIZE,)
    features = 0
    config = b""

    async def run(self, active: Activation) -> None:
        """Serve the queue until cancelled."""
        queue = active.queue(0)
        while True:
            more = True
            with queue as ring:
                ring.disarm()
                for _ in range(BATCH):
                    chain = ring.pop()
                    if chain is None:
                        more = ring.arm()
                        break
                    if not chain.writable:
                        raise QueueError("a request for random bytes without a buffer for them")
                    data = os.urandom(min(total_bytes(chain.writable), ANSWER_BYTES))
                    ring.push(chain, scatter(active.memory, chain.writable, data))
            if more:
                await trio.lowlevel.checkpoint()
            else:
                await queue.wait()

    def close(self) -> None:
        """Do nothing: it holds nothing."""
