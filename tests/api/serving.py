"""The real server on a real socket, and a client that sends bytes and takes responses apart."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h11
import trio

from kvmd.api.access import AccessRules
from kvmd.api.app import make_app
from kvmd.api.models import HostFacts
from kvmd.api.server.asgi import App, Message, Receive, Scope, Send
from kvmd.api.server.limits import Limits
from kvmd.api.server.listen import listening
from kvmd.api.server.server import Server
from kvmd.api.services import Services
from tests.fleet.fakes import FakeFleet

HOST = HostFacts(usable=True, fault_layout="merged", tripwires=["hole"], max_vcpus=4096)


@dataclass
class Answer:
    """One response, whole."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def problem(self) -> str:
        """The end of a problem document's type."""
        assert self.headers["content-type"] == "application/problem+json"
        document = self.json
        assert document["status"] == self.status
        assert document["title"]
        assert document["detail"].isprintable()
        return str(document["type"].removeprefix("urn:kvmd:problem:"))


class Client:
    """One connection."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.http = h11.Connection(h11.CLIENT)

    async def request(
        self, method: str, target: str, body: object = None, headers: dict[str, str] | None = None
    ) -> Answer:
        """Send a request and return its response."""
        await self.begin(method, target, body, headers)
        return await self.answer()

    async def get(self, target: str) -> Answer:
        return await self.request("GET", target)

    async def post(self, target: str, body: object = None) -> Answer:
        return await self.request("POST", target, body)

    async def begin(self, method: str, target: str, body: object = None, headers: dict[str, str] | None = None) -> None:
        """Send a request."""
        if self.http.our_state is h11.DONE:
            self.http.start_next_cycle()
        data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        fields = {"host": "kvmd", **({"content-type": "application/json"} if data else {}), **(headers or {})}
        if data or method in {"POST", "PUT"}:
            fields["content-length"] = str(len(data))
        sent = self.http.send(h11.Request(method=method, target=target, headers=list(fields.items()))) or b""
        if data:
            sent += self.http.send(h11.Data(data=data)) or b""
        await self.stream.send_all(sent + (self.http.send(h11.EndOfMessage()) or b""))

    async def head(self) -> h11.Response | h11.InformationalResponse:
        """Return the next response's header."""
        event = await self._event()
        assert isinstance(event, h11.Response | h11.InformationalResponse), event
        return event

    async def answer(self) -> Answer:
        """Return the next response."""
        head = await self.head()
        body = b""
        while not isinstance(event := await self._event(), h11.EndOfMessage):
            assert isinstance(event, h11.Data), event
            body += event.data
        return Answer(head.status_code, _fields(head), body)

    async def data(self) -> bytes:
        """Return the next part of a response's content; nothing at its end."""
        event = await self._event()
        if isinstance(event, h11.EndOfMessage):
            return b""
        assert isinstance(event, h11.Data), event
        return bytes(event.data)

    async def data_after_head(self) -> bytes:
        """Return the first part of a response's content."""
        await self.head()
        return await self.data()

    async def data_or_end(self) -> bytes:
        """Return the next part of a response's content; nothing at its end, or where the connection was cut."""
        try:
            return await self.data()
        except (h11.RemoteProtocolError, trio.BrokenResourceError):
            return b""

    async def until(self, wanted: bytes) -> bytes:
        """Return a response's content up to where ``wanted`` has come."""
        seen = b""
        while wanted not in seen:
            more = await self.data()
            assert more, f"the response ended after {seen!r}"
            seen += more
        return seen

    async def ended(self) -> bool:
        """Return whether nothing more comes: wait for the server to close the connection."""
        try:
            return await self.stream.receive_some(1) == b""
        except trio.BrokenResourceError:
            return True

    async def _event(self) -> object:
        while (event := self.http.next_event()) is h11.NEED_DATA:
            self.http.receive_data(await self.stream.receive_some(65536))
        return event


def _fields(head: h11.Response | h11.InformationalResponse) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in head.headers}


@dataclass
class Serving:
    """A server that runs."""

    path: Path
    server: Server
    fleet: FakeFleet = field(default_factory=FakeFleet)
    over: trio.Event = field(default_factory=trio.Event)
    cancel_scope: trio.CancelScope = field(default_factory=trio.CancelScope)

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Client]:
        stream = await trio.open_unix_socket(self.path)
        assert isinstance(stream, trio.SocketStream)
        async with stream:
            yield Client(stream)

    async def get(self, target: str) -> Answer:
        return await self.request("GET", target)

    async def post(self, target: str, body: object = None) -> Answer:
        return await self.request("POST", target, body)

    async def request(
        self, method: str, target: str, body: object = None, headers: dict[str, str] | None = None
    ) -> Answer:
        async with self.connect() as client:
            return await client.request(method, target, body, headers)


@asynccontextmanager
async def serving_app(app: App, path: Path, limits: Limits | None = None) -> AsyncIterator[Serving]:
    """Serve an app on a socket at ``path``; at the end the server has stopped within its drain deadline."""
    server = Server(app, limits=limits)
    serving = Serving(path, server)
    with listening(path) as listener:
        async with trio.open_nursery() as nursery:

            async def run(task_status: trio.TaskStatus[None]) -> None:
                with serving.cancel_scope:
                    await server.serve([listener], task_status=task_status)
                serving.over.set()

            await nursery.start(run)
            yield serving
            server.stop()
    assert server.open_connections == 0


@asynccontextmanager
async def serving_api(
    path: Path,
    *,
    limits: Limits | None = None,
    rules: AccessRules | None = None,
    image_folders: tuple[Path, ...] = (),
) -> AsyncIterator[Serving]:
    """Serve the API over a fleet in memory."""
    fleet = FakeFleet()
    services = Services(fleet=fleet, host=HOST, image_folders=image_folders)
    app = make_app(services, rules or AccessRules(own_uid=os.geteuid()))
    async with serving_app(app, path, limits) as serving:
        serving.fleet = fleet
        yield serving


def app_of(answer: Callable[[Scope, Receive, Send], Awaitable[None]]) -> App:
    """Return ``answer`` as an app: for its type."""
    return answer


async def respond(send: Send, body: bytes = b"ok", *, status: int = 200) -> None:
    """Send a whole response."""
    headers = [(b"content-length", b"%d" % len(body))]
    start: Message = {"type": "http.response.start", "status": status, "headers": headers}
    await send(start)
    await send({"type": "http.response.body", "body": body})
