"""The host's end of a guest's port: one program at a time talks through it to another in the guest."""

from __future__ import annotations

from collections.abc import Callable

import trio

from kvmd.closing import Closing
from kvmd.errors import DeviceInUse


class HostPort:
    """Where the host's programs come to a port. Everything happens in the event loop's thread.

    What the guest sends while nobody is there goes nowhere, and so does what somebody left unsent: whoever comes next
    has a stream of their own.

    Attributes:
        visit: counts those who were there, the one that is among them.
    """

    def __init__(self) -> None:
        self.visit = 0
        self._connection: PortConnection | None = None
        self._changed: Callable[[], None] = lambda: None
        self._send, self._receive = trio.open_memory_channel[tuple[int, bytes]](0)

    # -- the host's programs

    @property
    def in_use(self) -> bool:
        """Whether somebody is there."""
        return self._connection is not None

    def attach(self) -> PortConnection:
        """Be the one who talks through the port, until the connection is closed.

        Raises:
            DeviceInUse: somebody else is.
        """
        if self._connection is not None:
            raise DeviceInUse("somebody else talks to the agent: it has one connection at a time")
        self.visit += 1
        self._connection = PortConnection(self, self.visit, self._send)
        self._changed()
        return self._connection

    def leave(self, connection: PortConnection) -> None:
        """Let the next one in; harmless where the connection is over."""
        if self._connection is connection:
            self._connection = None
            self._changed()

    # -- the device

    def watch(self, changed: Callable[[], None]) -> None:
        """Have ``changed`` called whenever somebody came or left."""
        self._changed = changed

    async def take(self) -> tuple[int, bytes]:
        """Return what is to be sent to the guest, and the visit in which it was."""
        return await self._receive.receive()

    async def deliver(self, visit: int, data: bytes) -> None:
        """Hand over what the guest sent in this visit; returns when there is room for more."""
        if self._connection is None or visit != self.visit:
            await trio.lowlevel.checkpoint()
        else:
            await self._connection.hand_over(data)


class PortConnection(Closing):
    """One program's connection to a port: a context manager.

    Args:
        port: the port.
        visit: which one this is.
        outgoing: to the device.
    """

    def __init__(self, port: HostPort, visit: int, outgoing: trio.MemorySendChannel[tuple[int, bytes]]) -> None:
        self._port = port
        self._visit = visit
        self._outgoing = outgoing
        self._give, self._incoming = trio.open_memory_channel[bytes](0)

    async def send(self, data: bytes) -> None:
        """Send to the guest: waits until a program there has opened the port, and has taken all that came before."""
        if data:
            await self._outgoing.send((self._visit, data))

    async def receive(self) -> bytes:
        """Return what the guest sends next."""
        return await self._incoming.receive()

    async def hand_over(self, data: bytes) -> None:
        """Give this program what the guest sent; it is lost where the program has left."""
        try:
            await self._give.send(data)
        except trio.BrokenResourceError:
            await trio.lowlevel.checkpoint()

    def close(self) -> None:
        """Leave; harmless the second time."""
        self._incoming.close()
        self._port.leave(self)
