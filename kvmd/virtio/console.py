"""The virtio console: clause 5.3 of virtio 1.2, with one port, as a channel for an agent in the guest."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from kvmd.virtio.abi import DeviceId
from kvmd.virtio.device import Activation, Host
from kvmd.virtio.live_queue import LiveQueue
from kvmd.virtio.memory import GuestMemory, gather, scatter, split
from kvmd.virtio.split_queue import QueueError

RECEIVE, TRANSMIT = 0, 1
"""Queues: to the guest, from the guest."""

QUEUE_SIZE = 64
PIECE_BYTES = 1 << 16
"""Handed on at once, however large the guest's buffer is."""


class ConsoleDevice:
    """Bytes both ways, in order, with back-pressure both ways; nothing is lost but at a reset.

    Everything happens in the event loop's thread.

    Args:
        write: takes what the guest sends, and returns when there is room for more: until then the guest waits.
    """

    device_id = DeviceId.CONSOLE
    queue_sizes = (QUEUE_SIZE, QUEUE_SIZE)
    features = 0
    config = b""

    def __init__(self, write: Callable[[bytes], Awaitable[object]]) -> None:
        self._write = write
        self._send, self._receive = trio.open_memory_channel[bytes](0)

    async def send(self, data: bytes) -> None:
        """Send to the guest, once everything before is in its buffers; what is cancelled before that is not sent."""
        if data:
            await self._send.send(data)

    def bind(self, host: Host) -> None:
        """There is no configuration."""

    def refusal(self, features: int) -> str | None:  # noqa: ARG002 - the protocol has it
        """There are no features to choose."""
        return None

    def config_written(self, offset: int, data: bytes) -> bytes | None:  # noqa: ARG002 - the protocol has them
        """There is no configuration."""
        return None

    async def run(self, active: Activation) -> None:
        """Serve both queues until cancelled."""
        receive, transmit = active.queue(RECEIVE), active.queue(TRANSMIT)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._to_guest, receive, active.memory)
            nursery.start_soon(self._from_guest, transmit, active.memory)

    async def _from_guest(self, queue: LiveQueue, memory: GuestMemory) -> None:
        while True:
            with queue as ring:
                chain = ring.pop()
                more = chain is not None or ring.arm()
            if chain is None:
                if more:
                    await trio.lowlevel.checkpoint()
                else:
                    await queue.wait()
                continue
            rest = chain.readable
            while rest:
                piece, rest = split(rest, PIECE_BYTES)
                with queue:
                    data = gather(memory, piece)
                await self._write(data)
            with queue as ring:
                ring.push(chain, 0)

    async def _to_guest(self, queue: LiveQueue, memory: GuestMemory) -> None:
        while True:
            data = await self._receive.receive()
            while data:
                with queue as ring:
                    chain = ring.pop()
                    more = chain is not None or ring.arm()
                    if chain is not None:
                        if not chain.writable:
                            raise QueueError("a console buffer that nothing can be written to")
                        done = scatter(memory, chain.writable, data)
                        ring.push(chain, done)
                        data = data[done:]
                if not more:
                    await queue.wait()

    def close(self) -> None:
        """Send nothing more: who waits in ``send`` gets trio.BrokenResourceError."""
        self._receive.close()
