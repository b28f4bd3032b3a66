"""One request and its response, as an ASGI app sees them."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterable
from email.utils import formatdate
from typing import Any

import h11
import trio

from kvmd.api.server.asgi import Message
from kvmd.api.server.limits import Limits
from kvmd.api.server.wire import Wire

_SWITCHING_PROTOCOLS = 101


class Exchange:
    """The ``receive`` and ``send`` of one request.

    Args:
        wire: where bytes come and go.
        http: the connection's protocol, with the whole request read.
        head: whether the method is HEAD: the response's content is dropped.
        body: the request's content.
        limits: how long a response may stay unread.
        draining: set when the server stops; responses then say that they are the last.
    """

    def __init__(
        self, wire: Wire, http: h11.Connection, *, head: bool, body: bytes, limits: Limits, draining: trio.Event
    ) -> None:
        self._wire = wire
        self._http = http
        self._head = head
        self._body: bytes | None = body
        self._limits = limits
        self._draining = draining
        self._start: Message | None = None
        self._gone = False
        self._waiting: trio.CancelScope | None = None
        self.started = False
        self.complete = False
        self.upgraded = False

    # -- from the client

    async def receive(self) -> Message:
        """Return the request's content, then wait until the client has gone or the response is complete."""
        if self.upgraded:
            return await self._receive_raw()
        if self._body is not None:
            body, self._body = self._body, None
            await trio.lowlevel.checkpoint()
            return {"type": "http.request", "body": body, "more_body": False}
        if not (self._gone or self.complete):
            with trio.CancelScope() as self._waiting:
                await self._wait_gone()
                self._gone = True
            self._waiting = None
        await trio.lowlevel.checkpoint()
        return {"type": "http.disconnect"}

    async def _wait_gone(self) -> None:
        """Return when the client can no longer read. One that only sends no more (shutdown(2), SHUT_WR) still can."""
        ahead = len(self._http.trailing_data[0])
        while not self._wire.ended:
            if ahead > self._limits.header_bytes + self._limits.body_bytes:
                # A client that sends many requests at once waits until they have their turn.
                await trio.sleep_forever()
            data = await self._wire.receive()
            if data:
                ahead += len(data)
                self._http.receive_data(data)
        await self._wire.wait_hung_up()

    async def _receive_raw(self) -> Message:
        if self._body is not None:
            # What came behind the request's header belongs to the new protocol already (RFC 9110 7.8).
            self._body = None
            data, _ = self._http.trailing_data
            if data:
                await trio.lowlevel.checkpoint()
                return {"type": "http.request", "body": data, "more_body": True}
        if not self._wire.ended:
            data = await self._wire.receive()
            return {"type": "http.request", "body": data, "more_body": bool(data)}
        await self._wire.wait_hung_up()
        self._gone = True
        return {"type": "http.disconnect"}

    # -- to the client

    async def send(self, message: Message) -> None:
        """Take a message of the app's; dropped once the client has gone, as ASGI 2.3 wants it."""
        match message["type"]:
            case "http.response.start" if self._start is None:
                self._start = message
                if message["status"] == _SWITCHING_PROTOCOLS:
                    await self._switch(message)
            case "http.response.body" if self.complete and self._head:
                await trio.lowlevel.checkpoint()  # the app goes on with content that was never wanted
            case "http.response.body" if self._start is not None and not self.complete:
                body, more = message.get("body", b""), message.get("more_body", False)
                if self.upgraded:
                    await self._write(body, math.inf)
                else:
                    await self._respond(self._start, body, more=more)
            case kind:
                raise RuntimeError(f"the app sent {kind} when it had no place")

    async def _switch(self, start: Message) -> None:
        headers = [*start["headers"], (b"connection", b"upgrade")]
        data = self._http.send(h11.InformationalResponse(status_code=_SWITCHING_PROTOCOLS, headers=headers))
        self.started = self.upgraded = True
        await self._write(data, math.inf)

    async def _respond(self, start: Message, body: bytes, *, more: bool) -> None:
        if self._head:
            # Its response ends with the header, however long the app would go on.
            body, more = b"", False
        data = b"" if self.started else self._header(start)
        if body:
            data += self._http.send(h11.Data(data=body)) or b""
        if not more:
            data += self._http.send(h11.EndOfMessage()) or b""
        # The header and the first content in one call: half of what a small response costs is system calls.
        await self._write(data, math.inf if more else self._limits.unread_seconds)
        if not more:
            self.complete = True
            self._let_go()

    def _header(self, start: Message) -> bytes:
        self.started = True
        headers: list[Any] = [*_end_to_end(start.get("headers", ())), (b"date", _date(int(time.time())))]
        if self._draining.is_set():
            headers.append((b"connection", b"close"))
        return self._http.send(h11.Response(status_code=start["status"], headers=headers)) or b""

    async def _write(self, data: bytes | None, seconds: float) -> None:
        if self._gone or not data:
            await trio.lowlevel.checkpoint()
            return
        written = False
        try:
            written = await self._wire.send(data, seconds)
        finally:
            if not written:
                # Cancelled or failed in the middle: nothing that follows would make sense to the client.
                self._gone = True
                self._let_go()

    def _let_go(self) -> None:
        """Let a ``receive`` that waits for the client's end return."""
        if self._waiting is not None:
            self._waiting.cancel()

    @property
    def gone(self) -> bool:
        """Whether the client can no longer read."""
        return self._gone

    def check_answered(self) -> None:
        """Raise RuntimeError where the app is done with a client that is still there, and answered it nothing."""
        if not (self.started or self._gone):
            raise RuntimeError("the app answered nothing")


def _end_to_end(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return the app's header fields without those that are the connection's business."""
    return [(name, value) for name, value in headers if name.lower() not in {b"connection", b"transfer-encoding"}]


@functools.lru_cache(maxsize=2)
def _date(second: int) -> bytes:
    """Return the Date field's value (RFC 9110 5.6.7)."""
    return formatdate(second, usegmt=True).encode()
