"""The virtio console: clause 5.3 of virtio 1.2, with one named port for an agent in the guest."""

from __future__ import annotations

import struct

import trio

from kvmd.virtio.abi import DeviceId
from kvmd.virtio.activation import Activation
from kvmd.virtio.console_control import PORT, PortControl
from kvmd.virtio.device_model import PlainModel
from kvmd.virtio.host_port import HostPort
from kvmd.virtio.live_queue import LiveQueue
from kvmd.virtio.memory import GuestMemory, gather, scatter, split, total_bytes
from kvmd.virtio.split_queue import QueueError

F_MULTIPORT = 1 << 1

RECEIVE, TRANSMIT = 0, 1
"""Queues of port 0: to the guest, from the guest."""
CONTROL_RECEIVE, CONTROL_TRANSMIT = 2, 3
PORT_RECEIVE, PORT_TRANSMIT = 2 + 2 * PORT, 3 + 2 * PORT
"""Queues of the port (clause 5.3.2)."""

QUEUE_SIZE = 64
PIECE_BYTES = 1 << 16
"""Handed on at once, however large the guest's buffer is."""

CONTROL_LIMIT = 256
"""Bytes that are read of a control message: they have 8."""

_CONFIG = struct.Struct("<HHII")


class ConsoleDevice(PlainModel):
    """A port: bytes both ways, in order, with back-pressure both ways.

    A driver that knows nothing of ports (VIRTIO_CONSOLE_F_MULTIPORT) has a console, ``hvc0`` of Linux, in its place.
    Everything happens in the event loop's thread.

    Args:
        port: the host's end.
        name: of the port: a program in a Linux guest finds it as ``/dev/virtio-ports/NAME``.
    """

    device_id = DeviceId.CONSOLE
    queue_sizes = (QUEUE_SIZE,) * (PORT_TRANSMIT + 1)
    features = F_MULTIPORT
    config = _CONFIG.pack(0, 0, PORT + 1, 0)

    def __init__(self, port: HostPort, name: str) -> None:
        self._port = port
        self._name = name

    async def run(self, active: Activation) -> None:
        """Serve the queues until cancelled."""
        running = _Running(active, self._port, PortControl(self._name))
        try:
            async with trio.open_nursery() as nursery:
                if active.features & F_MULTIPORT:
                    nursery.start_soon(running.hear, active.queue(CONTROL_TRANSMIT))
                    nursery.start_soon(running.tell, active.queue(CONTROL_RECEIVE))
                    nursery.start_soon(running.to_guest, active.queue(PORT_RECEIVE))
                    nursery.start_soon(running.from_guest, active.queue(PORT_TRANSMIT))
                else:
                    running.control.guest_open = True
                    nursery.start_soon(running.to_guest, active.queue(RECEIVE))
                    nursery.start_soon(running.from_guest, active.queue(TRANSMIT))
        finally:
            self._port.watch(lambda: None)

    def close(self) -> None:
        """Do nothing: it holds nothing."""


class _Running:
    """The device from one reset to the next."""

    def __init__(self, active: Activation, port: HostPort, control: PortControl) -> None:
        self.control = control
        self._memory: GuestMemory = active.memory
        self._port = port
        self._news = trio.Event()
        port.watch(self._host_changed)
        control.host(is_open=port.in_use)

    async def hear(self, queue: LiveQueue) -> None:
        """Take the driver's control messages."""
        while True:
            with queue as ring:
                chain = ring.pop()
                more = chain is not None or ring.arm()
                if chain is not None:
                    message, _ = split(chain.readable, CONTROL_LIMIT) if chain.readable else ([], [])
                    self.control.received(gather(self._memory, message) if message else b"")
                    ring.push(chain, 0)
            if chain is not None:
                self._wake()
            if more:
                await trio.lowlevel.checkpoint()
            else:
                await queue.wait()

    async def tell(self, queue: LiveQueue) -> None:
        """Send control messages to the driver."""
        while True:
            while (message := self.control.next()) is None:
                await self._news.wait()
            with queue as ring:
                chain = ring.pop()
                more = chain is not None or ring.arm()
                if chain is not None:
                    if total_bytes(chain.writable) < len(message):
                        raise QueueError(f"a buffer for control messages of {total_bytes(chain.writable)} bytes")
                    ring.push(chain, scatter(self._memory, chain.writable, message))
                    self.control.told()
            if more:
                await trio.lowlevel.checkpoint()
            else:
                await queue.wait()

    async def from_guest(self, queue: LiveQueue) -> None:
        """Hand over what the guest sends."""
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
            rest, visit = chain.readable, self._port.visit
            while rest:
                piece, rest = split(rest, PIECE_BYTES)
                with queue:
                    data = gather(self._memory, piece)
                await self._port.deliver(visit, data)
            with queue as ring:
                ring.push(chain, 0)

    async def to_guest(self, queue: LiveQueue) -> None:
        """Send the guest what is for it, while a program there has the port open."""
        while True:
            await self._until_open()
            visit, data = await self._port.take()
            while data:
                await self._until_open()
                # What somebody had still to say who has left is not for the guest any more.
                if visit != self._port.visit or not self._port.in_use:
                    break
                with queue as ring:
                    chain = ring.pop()
                    more = chain is not None or ring.arm()
                    if chain is not None:
                        if not chain.writable:
                            raise QueueError("a console buffer that nothing can be written to")
                        done = scatter(self._memory, chain.writable, data)
                        ring.push(chain, done)
                        data = data[done:]
                # A guest may offer one byte at a time, as fast as it is given.
                if more:
                    await trio.lowlevel.checkpoint()
                else:
                    await queue.wait()

    async def _until_open(self) -> None:
        while not self.control.guest_open:
            await self._news.wait()

    def _host_changed(self) -> None:
        self.control.host(is_open=self._port.in_use)
        self._wake()

    def _wake(self) -> None:
        event, self._news = self._news, trio.Event()
        event.set()
