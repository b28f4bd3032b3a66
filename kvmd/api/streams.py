"""Responses without an end: events, console, log. They end with what they show, with their client, or with kvmd.

No async generator of the fleet's is ever cancelled while it works: a task of its own takes from it, and hands over
through a channel. So its ``finally`` runs where it should, and a keep-alive needs no deadline on it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Generic, Protocol, TypeVar

import trio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kvmd.api.server.asgi import DRAINING, HUNG_UP
from kvmd.errors import MachineStateError
from kvmd.fleet.base import Console

KEEP_ALIVE_SECONDS = 15.0
"""After so long without an event a comment is sent, so that a connection without a client is found out."""

_ITEMS = 256
"""Items between the task that takes and the one that writes. A reader that is slower loses them in the fleet, which
counts them."""

_WRITE_BYTES = 65536
_END = {"type": "http.response.body", "body": b"", "more_body": False}

T = TypeVar("T")
Item_contra = TypeVar("Item_contra", contravariant=True)
Items = TypeVar("Items", bound=AsyncIterator[Any])


class Encoder(Protocol[Item_contra]):
    """Makes the bytes of a stream."""

    def greeting(self) -> bytes:
        """Return what is sent at once, so that a client knows that it is connected."""

    def encode(self, item: Item_contra) -> bytes:
        """Return an item; nothing where it is not shown."""

    def keep_alive(self) -> bytes:
        """Return what is sent after ``KEEP_ALIVE_SECONDS`` without an item; nothing where there is no way to."""

    def farewell(self) -> bytes:
        """Return what is sent where the stream has come to its own end, and is not cut off by the daemon's."""


class Streaming(Response, Generic[Items, T]):
    """Sends what a stream of the fleet's yields, as it comes.

    Args:
        opened: enters the stream; its errors are answered like any other's, since nothing was sent by then.
        encoder: makes what makes bytes of that stream.
        media_type: of all of it.
    """

    def __init__(
        self,
        opened: Callable[[], AbstractAsyncContextManager[Items]],
        encoder: Callable[[Items], Encoder[T]],
        *,
        media_type: str,
    ) -> None:
        super().__init__(media_type=media_type, headers={"cache-control": "no-store"})
        del self.headers["content-length"]
        self._opened = opened
        self._encoder = encoder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until one of the three ends."""
        async with self._opened() as items:
            encoder = self._encoder(items)
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async with trio.open_nursery() as nursery:
                nursery.start_soon(cancel_when_over, scope, receive, nursery.cancel_scope)
                give, take = trio.open_memory_channel[bytes](_ITEMS)
                nursery.start_soon(self._take, items, encoder, give)
                await send({"type": "http.response.body", "body": encoder.greeting(), "more_body": True})
                await self._write(take, encoder, send)
                await send({"type": "http.response.body", "body": encoder.farewell(), "more_body": True})
                nursery.cancel_scope.cancel()
            await send(_END)

    async def _take(self, items: Items, encoder: Encoder[T], give: trio.MemorySendChannel[bytes]) -> None:
        with give:
            try:
                async for item in items:
                    data = encoder.encode(item)
                    if data:
                        # Most events come in batches: a task switch for each would be most of their cost.
                        try:
                            give.send_nowait(data)
                        except trio.WouldBlock:
                            await give.send(data)
            finally:
                # Where it is an async generator, nobody else would end it before the garbage collector.
                close = getattr(items, "aclose", None)
                if close is not None:
                    await close()

    async def _write(self, take: trio.MemoryReceiveChannel[bytes], encoder: Encoder[T], send: Send) -> None:
        while True:
            data = None
            with trio.move_on_after(KEEP_ALIVE_SECONDS):
                try:
                    data = await take.receive()
                except trio.EndOfChannel:
                    return
                data += _what_is_there(take)
            if data is None:
                data = encoder.keep_alive()
            if data:
                await send({"type": "http.response.body", "body": data, "more_body": True})


class ConsoleConnection(Response):
    """A console, or an agent, on an upgraded connection: what the client sends goes there, what comes back is sent.

    A client that hangs up is noticed also while the guest does not take what it has sent.

    Args:
        opened: attaches to the console or the agent.
        protocol: the name that both sides agreed on.
    """

    def __init__(self, opened: Callable[[], AbstractAsyncContextManager[Console]], protocol: str) -> None:
        super().__init__(status_code=101, headers={"upgrade": protocol})
        self._opened = opened

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Carry bytes both ways until one side ends."""
        async with self._opened() as console:
            headers = [(name, value) for name, value in self.raw_headers if name == b"upgrade"]
            await send({"type": "http.response.start", "status": 101, "headers": headers})
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_cancel_when_draining, scope, nursery.cancel_scope)
                nursery.start_soon(_type, console, receive, nursery.cancel_scope)
                nursery.start_soon(_cancel_when_hung_up, scope, nursery.cancel_scope)
                while data := await console.receive():
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                nursery.cancel_scope.cancel()


async def _type(console: Console, receive: Receive, scope: trio.CancelScope) -> None:
    while (message := await receive())["type"] == "http.request":
        try:
            if message["body"]:
                await console.send(message["body"])
        except MachineStateError:
            await trio.sleep_forever()  # the machine has ended: its last output ends the connection
    scope.cancel()


async def cancel_when_over(scope: Scope, receive: Receive, cancel_scope: trio.CancelScope) -> None:
    """Cancel once the client has gone or kvmd stops."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_cancel_when_draining, scope, cancel_scope)
        while (await receive())["type"] != "http.disconnect":
            pass
        cancel_scope.cancel()


async def _cancel_when_draining(scope: Scope, cancel_scope: trio.CancelScope) -> None:
    await scope["extensions"][DRAINING].wait()
    cancel_scope.cancel()


async def _cancel_when_hung_up(scope: Scope, cancel_scope: trio.CancelScope) -> None:
    await scope["extensions"][HUNG_UP]()
    cancel_scope.cancel()


def _what_is_there(take: trio.MemoryReceiveChannel[bytes]) -> bytes:
    """Return more that waits already: one system call for many events."""
    parts: list[bytes] = []
    size = 0
    while size < _WRITE_BYTES:
        try:
            part = take.receive_nowait()
        except (trio.WouldBlock, trio.EndOfChannel):
            break
        parts.append(part)
        size += len(part)
    return b"".join(parts)
