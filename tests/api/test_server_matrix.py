"""Every kind of client, times every kind of end: nothing hangs past the drain deadline, nothing is left.

What is left behind (descriptors, threads) is looked for by the fixture of tests/conftest.py; connections by
``serving_app``.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from kvmd.api.server.asgi import DRAINING, Receive, Scope, Send
from kvmd.api.server.limits import Limits
from tests.api.serving import Client, Serving, respond, serving_app

DRAIN_SECONDS = 0.3
LIMITS = Limits(drain_seconds=DRAIN_SECONDS)
WAY_TOO_LONG_SECONDS = 20.0
"""Only a server that hangs gets here."""

START = {"type": "http.response.start", "status": 200, "headers": []}


class App:
    """Answers ``/``; streams without an end on ``/stream``, politely on ``/polite``; never answers ``/never``."""

    def __init__(self) -> None:
        self.running = 0
        self.cleaned_up = 0
        self.entered = trio.Event()
        self.calls = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/":
            await respond(send)
            return
        self.running += 1
        self.entered.set()
        try:
            if scope["path"] == "/never":
                await trio.sleep_forever()
            await self._stream(scope, receive, send)
        finally:
            self.running -= 1
            self.cleaned_up += 1

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._cancel_when_gone, receive, nursery.cancel_scope)
            if scope["path"] == "/polite":
                nursery.start_soon(self._cancel_when_draining, scope, nursery.cancel_scope)
            await self._pour(send)
        await send({"type": "http.response.body", "body": b"bye", "more_body": False})

    async def _pour(self, send: Send) -> None:
        while True:
            self.calls += 1
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})

    @staticmethod
    async def _cancel_when_gone(receive: Receive, scope: trio.CancelScope) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        scope.cancel()

    @staticmethod
    async def _cancel_when_draining(scope: Scope, cancel_scope: trio.CancelScope) -> None:
        await scope["extensions"][DRAINING].wait()
        cancel_scope.cancel()


# -- clients: each returns once the server is busy with it -------------------------------------------------------------


async def idle(_app: App, _client: Client) -> None:
    """Connected, and says nothing."""


async def idle_after_a_request(_app: App, client: Client) -> None:
    assert (await client.get("/")).body == b"ok"


async def half_a_header(_app: App, client: Client) -> None:
    await client.stream.send_all(b"GET / HTTP/1.1\r\nHost: k")


async def half_a_body(_app: App, client: Client) -> None:
    await client.stream.send_all(b"POST / HTTP/1.1\r\nHost: k\r\nContent-Length: 10\r\n\r\n123")


async def unanswered(app: App, client: Client) -> None:
    await client.begin("GET", "/never")
    await app.entered.wait()


async def streaming(app: App, client: Client) -> None:
    await client.begin("GET", "/polite")
    await app.entered.wait()
    assert await client.data_after_head()


async def stalled(app: App, client: Client) -> None:
    """Asks for a stream, and never reads it: the server's send blocks."""
    await client.begin("GET", "/stream")
    await app.entered.wait()
    calls = -1
    while calls != app.calls:  # as long as it gets something into the socket's buffer
        calls = app.calls
        await trio.testing.wait_all_tasks_blocked(0.02)


async def half_open(app: App, client: Client) -> None:
    """Has said that it sends no more, and reads on."""
    await client.begin("GET", "/polite")
    client.stream.socket.shutdown(socket.SHUT_WR)
    await app.entered.wait()
    assert await client.data_after_head()


CLIENTS = [
    idle,
    idle_after_a_request,
    half_a_header,
    half_a_body,
    unanswered,
    streaming,
    stalled,
    half_open,
]
ClientKind = Callable[[App, Client], Awaitable[None]]


@asynccontextmanager
async def a_client(kind: ClientKind, path: Path) -> AsyncIterator[tuple[Serving, App, Client]]:
    app = App()
    with trio.fail_after(WAY_TOO_LONG_SECONDS):
        async with serving_app(app, path, LIMITS) as serving, serving.connect() as client:
            await kind(app, client)
            yield serving, app, client
    assert app.running == 0


@pytest.mark.parametrize("kind", CLIENTS)
async def test_a_shutdown_is_over_by_the_drain_deadline(kind: ClientKind, tmp_path: Path) -> None:
    async with a_client(kind, tmp_path / "s") as (serving, app, _):
        serving.server.stop()
        with trio.fail_after(DRAIN_SECONDS + 10):
            await serving.over.wait()
        assert serving.server.open_connections == 0
        assert app.running == 0


@pytest.mark.parametrize("kind", CLIENTS)
async def test_a_cancelled_server_is_over_at_once(kind: ClientKind, tmp_path: Path) -> None:
    async with a_client(kind, tmp_path / "s") as (serving, app, _):
        serving.cancel_scope.cancel()
        with trio.fail_after(10):
            await serving.over.wait()
        assert serving.server.open_connections == 0
        assert app.running == 0


@pytest.mark.parametrize("kind", [kind for kind in CLIENTS if kind is not unanswered])
async def test_a_client_that_leaves_is_forgotten(kind: ClientKind, tmp_path: Path) -> None:
    async with a_client(kind, tmp_path / "s") as (serving, app, client):
        await client.stream.aclose()
        await until_alone(serving)
        assert app.running == 0


async def until_alone(serving: Serving) -> None:
    with trio.fail_after(10):
        while serving.server.open_connections:  # noqa: ASYNC110 - nobody tells; the deadline says when it is too long
            await trio.sleep(0.001)


async def test_an_app_that_does_not_listen_keeps_its_connection_until_the_drain(tmp_path: Path) -> None:
    # A client that leaves does not undo what it asked for: a machine's start is not cancelled half-way.
    async with a_client(unanswered, tmp_path / "s") as (serving, app, client):
        await client.stream.aclose()
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert app.running == 1
        serving.server.stop()
        await serving.over.wait()
        assert app.running == 0


@pytest.mark.parametrize("kind", [idle, idle_after_a_request, half_a_header])
async def test_who_waits_for_nothing_is_let_go_at_once(kind: ClientKind, tmp_path: Path) -> None:
    app = App()
    limits = Limits(drain_seconds=WAY_TOO_LONG_SECONDS)
    with trio.fail_after(10):
        async with serving_app(app, tmp_path / "s", limits) as serving, serving.connect() as client:
            await kind(app, client)
            serving.server.stop()
            await serving.over.wait()
            assert await client.ended()


@pytest.mark.parametrize("kind", [streaming, half_open])
async def test_a_stream_that_listens_for_the_drain_ends_properly(kind: ClientKind, tmp_path: Path) -> None:
    limits = Limits(drain_seconds=WAY_TOO_LONG_SECONDS)
    app = App()
    with trio.fail_after(10):
        async with serving_app(app, tmp_path / "s", limits) as serving, serving.connect() as client:
            await kind(app, client)
            serving.server.stop()
            seen = b""
            while data := await client.data_or_end():
                seen = data
            # Whatever was under way when the drain began was cut; or the goodbye came.
            assert seen.endswith((b"bye", b"x"))
            await serving.over.wait()


async def test_a_request_under_way_is_answered_during_the_drain(tmp_path: Path) -> None:
    asked, answer = trio.Event(), trio.Event()

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        asked.set()
        await answer.wait()
        await respond(send, b"done")

    with trio.fail_after(10):
        async with serving_app(app, tmp_path / "s", Limits(drain_seconds=8)) as serving, serving.connect() as client:
            await client.begin("GET", "/")
            await asked.wait()
            serving.server.stop()
            answer.set()
            got = await client.answer()
            assert (got.status, got.body, got.headers["connection"]) == (200, b"done", "close")
            assert await client.ended()
            await serving.over.wait()


async def test_nobody_new_is_let_in_after_the_stop(tmp_path: Path) -> None:
    async with serving_app(App(), tmp_path / "s", LIMITS) as serving:
        serving.server.stop()
        await serving.over.wait()
        async with serving.connect() as client:
            # The listener is its owner's and still there, but nobody takes from it.
            with trio.move_on_after(0.05) as scope:
                await client.get("/")
            assert scope.cancelled_caught
