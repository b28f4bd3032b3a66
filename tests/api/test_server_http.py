"""HTTP/1.1 as clients speak it, and as they should not (RFC 9110, RFC 9112)."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.lowlevel
import trio.testing
from trio.testing import MockClock

from kvmd.api.server.asgi import PEER, UPGRADE, Receive, Scope, Send
from kvmd.api.server.limits import Limits
from kvmd.units import KIB
from tests.api.serving import Serving, respond, serving_app

LIMITS = Limits(body_bytes=4 * KIB, header_bytes=4 * KIB, linger_seconds=0.2, drain_seconds=1)
SOON_SECONDS = 0.05


class Recorder:
    """Answers with the request's content, and keeps what it saw."""

    def __init__(self) -> None:
        self.scopes: list[dict[str, Any]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(dict(scope))
        match scope["path"]:
            case "/bug":
                raise LookupError("the app's own secret")
            case "/late-bug":
                await send({"type": "http.response.start", "status": 200, "headers": []})
                await send({"type": "http.response.body", "body": b"so far", "more_body": True})
                raise LookupError
            case "/nothing":
                return
            case "/chunks":
                await send({"type": "http.response.start", "status": 200, "headers": []})
                for part in (b"a", b"b", b""):
                    await send({"type": "http.response.body", "body": part, "more_body": bool(part)})
            case "/echo":
                await send({"type": "http.response.start", "status": 101, "headers": [(b"upgrade", b"echo")]})
                while (message := await receive())["more_body"]:
                    await send({"type": "http.response.body", "body": message["body"].upper(), "more_body": True})
                await send({"type": "http.response.body", "body": b"END", "more_body": True})
            case _:
                await respond(send, (await receive())["body"])


@pytest.fixture
def app() -> Recorder:
    return Recorder()


@pytest.fixture
async def serving(app: Recorder, tmp_path: Path) -> AsyncIterator[Serving]:
    async with serving_app(app, tmp_path / "s", LIMITS) as serving:
        yield serving


async def raw(serving: Serving, data: bytes) -> bytes:
    """Send bytes, and return all that comes back up to the server's end."""
    async with serving.connect() as client:
        await client.stream.send_all(data)
        got = b""
        with trio.fail_after(10):
            try:
                while more := await client.stream.receive_some(65536):
                    got += more
            except trio.BrokenResourceError:
                pass
        return got


CLOSE = b"Host: k\r\nConnection: close\r\n\r\n"


# -- what is right -----------------------------------------------------------------------------------------------------


async def test_a_connection_is_kept_for_many_requests(serving: Serving) -> None:
    async with serving.connect() as client:
        for body in (b"one", b"two", b"three"):
            assert (await client.request("POST", "/", body)).body == body
    assert serving.server.accepted == 1


async def test_it_ends_where_the_client_wants_it(serving: Serving) -> None:
    async with serving.connect() as client:
        answer = await client.request("GET", "/", headers={"connection": "close"})
        assert answer.headers["connection"] == "close"
        assert await client.ended()


async def test_requests_at_once_are_answered_in_order(serving: Serving) -> None:
    one = b"POST / HTTP/1.1\r\nHost: k\r\nContent-Length: 1\r\n\r\n"
    got = await raw(serving, one + b"1" + one + b"2" + b"POST / HTTP/1.1\r\nContent-Length: 1\r\n" + CLOSE + b"3")
    bodies = [part.partition(b"\r\n\r\n")[2][:1] for part in got.split(b"HTTP/1.1 200")[1:]]
    assert bodies == [b"1", b"2", b"3"]


async def test_a_client_that_only_sends_no_more_is_answered(serving: Serving) -> None:
    async with serving.connect() as client:
        await client.begin("POST", "/", b"all there is")
        client.stream.socket.shutdown(socket.SHUT_WR)
        assert (await client.answer()).body == b"all there is"
        assert await client.ended()


async def test_head_is_get_without_content(serving: Serving) -> None:
    got = await raw(serving, b"HEAD /chunks HTTP/1.1\r\nHost: k\r\n\r\nHEAD / HTTP/1.1\r\n" + CLOSE)
    assert got.count(b"HTTP/1.1 200") == 2
    assert got.endswith(b"\r\n\r\n")
    assert b"a\r\n" not in got.partition(b"\r\n\r\n")[2].partition(b"HTTP/1.1")[0]


async def test_expect_100_continue_is_answered_before_the_content(serving: Serving) -> None:
    async with serving.connect() as client:
        head = b"POST / HTTP/1.1\r\nHost: k\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n"
        await client.stream.send_all(head)
        assert await client.stream.receive_some(1000) == b"HTTP/1.1 100 \r\n\r\n"
        await client.stream.send_all(b"hi")
        assert (await client.stream.receive_some(1000)).startswith(b"HTTP/1.1 200")


async def test_content_that_is_too_large_is_not_asked_for(serving: Serving) -> None:
    head = b"POST / HTTP/1.1\r\nHost: k\r\nContent-Length: 9999\r\nExpect: 100-continue\r\n\r\n"
    assert (await raw(serving, head)).startswith(b"HTTP/1.1 413")


async def test_http_1_0_is_understood(serving: Serving) -> None:
    got = await raw(serving, b"GET /chunks HTTP/1.0\r\n\r\n")
    assert got.startswith(b"HTTP/1.1 200")
    assert got.endswith(b"\r\n\r\nab")


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        (b"/a%20b?c=%2F", "/a b", b"c=%2F"),
        (b"http://host/a?b", "/a", b"b"),
        (b"HTTP://host", "/", b""),
        (b"http://host?b", "/", b"b"),
        (b"/%C3%A9", "/é", b""),
    ],
)
async def test_targets(app: Recorder, serving: Serving, target: bytes, path: str, query: bytes) -> None:
    await raw(serving, b"GET " + target + b" HTTP/1.1\r\n" + CLOSE)
    (scope,) = app.scopes
    assert (scope["path"], scope["query_string"]) == (path, query)


async def test_the_app_is_told_what_asgi_says(app: Recorder, serving: Serving) -> None:
    await serving.get("/x")
    (scope,) = app.scopes
    assert scope["asgi"] == {"version": "3.0", "spec_version": "2.3"}
    peer = scope["extensions"][PEER]
    assert (peer.pid, peer.uid) == (os.getpid(), os.geteuid())
    assert os.getegid() in peer.groups
    assert set(os.getgroups()) <= peer.groups


# -- an upgraded connection --------------------------------------------------------------------------------------------


async def test_an_upgraded_connection_carries_bytes_both_ways(app: Recorder, serving: Serving) -> None:
    async with serving.connect() as client:
        head = b"GET /echo HTTP/1.1\r\nHost: k\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n"
        # The first bytes of the new protocol may come with the header.
        await client.stream.send_all(head + b"abc")
        got = b""
        while not got.endswith(b"ABC"):
            got += await client.stream.receive_some(1000)
        assert got.startswith(b"HTTP/1.1 101")
        await client.stream.send_all(b"\r\n\r\ndef")
        assert await client.stream.receive_some(1000) == b"\r\n\r\nDEF"
        client.stream.socket.shutdown(socket.SHUT_WR)
        assert await client.stream.receive_some(1000) == b"END"
        assert await client.ended()
    assert app.scopes[0]["extensions"][UPGRADE] == "echo"


async def test_an_upgrade_that_the_app_does_not_take_is_an_ordinary_request(serving: Serving) -> None:
    async with serving.connect() as client:
        headers = {"connection": "upgrade", "upgrade": "h2c"}
        assert (await client.request("GET", "/", headers=headers)).status == 200


# -- what is wrong -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),  # without Host
        (b"GET / HTTP/1.1\r\nHost: k\r\nHost: l\r\n\r\n", 400),
        (b"GET /\0 HTTP/1.1\r\nHost: k\r\n\r\n", 400),
        (b"GET / HTTP/2.0\r\nHost: k\r\n\r\n", 505),
        (b"GET /%ff HTTP/1.1\r\nHost: k\r\n\r\n", 400),
        (b"GET x HTTP/1.1\r\nHost: k\r\n\r\n", 400),
        (b"CONNECT host:1 HTTP/1.1\r\nHost: k\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: k\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: k\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: k\r\nContent-Length: " + b"9" * 20 + b"\r\n\r\n", 413),
        (b"POST / HTTP/1.1\r\nHost: k\r\nContent-Length: " + b"9" * 40 + b"\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: k\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
        (b"POST / HTTP/1.1\r\nHost: k\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: k\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1000\r\n" + b"x" * 4096 + b"\r\n"
         b"1\r\nx\r\n0\r\n\r\n", 413),
        (b"GET / HTTP/1.1\r\nHost: k\r\nX: " + b"x" * 5000, 431),
        (b"GET /" + b"x" * 5000, 431),
    ],
)  # fmt: skip
async def test_malformed_requests_are_refused(app: Recorder, serving: Serving, data: bytes, status: int) -> None:
    got = await raw(serving, data)
    assert got.startswith(b"HTTP/1.1 %d" % status), got
    assert b"content-type: application/problem+json" in got.lower()
    assert b"connection: close" in got.lower()
    assert app.scopes == []
    assert (await serving.get("/")).status == 200


async def test_a_header_that_ends_in_the_middle_is_refused(serving: Serving) -> None:
    async with serving.connect() as client:
        await client.stream.send_all(b"GET / HT")
        client.stream.socket.shutdown(socket.SHUT_WR)
        assert (await client.stream.receive_some(1000)).startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_bug_of_the_app_ends_one_connection(serving: Serving, method: str) -> None:
    for path in ("/bug", "/nothing"):
        async with serving.connect() as client:
            answer = await client.request(method, path)
            assert answer.status == 500
            assert b"secret" not in answer.body
            assert await client.ended()


async def test_a_bug_in_the_middle_of_a_response_cuts_it(serving: Serving) -> None:
    got = await raw(serving, b"GET /late-bug HTTP/1.1\r\nHost: k\r\n\r\n")
    assert got.endswith(b"6\r\nso far\r\n")


# -- slow clients: the clock is trio's, and goes on only when there is nothing to do -----------------------------------


@pytest.mark.parametrize(
    ("limits", "data", "status"),
    [
        (Limits(header_seconds=SOON_SECONDS), b"GET / HTTP/1.1\r\n", b"408"),
        (Limits(body_seconds=SOON_SECONDS), b"POST / HTTP/1.1\r\nHost: k\r\nContent-Length: 5\r\n\r\n1", b"408"),
        (
            Limits(body_seconds=SOON_SECONDS),
            b"POST / HTTP/1.1\r\nHost: k\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"408",
        ),
        (Limits(header_seconds=SOON_SECONDS), b"", b""),
    ],
)
async def test_slow_requests_are_ended(
    app: Recorder,
    tmp_path: Path,
    limits: Limits,
    data: bytes,
    status: bytes,
    autojump_clock: MockClock,  # noqa: ARG001 - a clock that jumps
) -> None:
    async with serving_app(app, tmp_path / "s", limits) as serving:
        got = await raw(serving, data)
    assert got[9:12] == status
    assert app.scopes == []


async def test_a_connection_between_two_requests_is_ended_too(
    app: Recorder,
    tmp_path: Path,
    autojump_clock: MockClock,  # noqa: ARG001 - a clock that jumps
) -> None:
    async with serving_app(app, tmp_path / "s", Limits(idle_seconds=SOON_SECONDS)) as serving, serving.connect() as one:
        assert (await one.get("/")).status == 200
        with trio.fail_after(10):
            assert await one.ended()


async def test_a_byte_now_and_then_does_not_move_the_deadline(
    app: Recorder,
    tmp_path: Path,
    autojump_clock: MockClock,  # noqa: ARG001 - a clock that jumps
) -> None:
    limits = Limits(header_seconds=0.2)
    with trio.fail_after(10):
        async with serving_app(app, tmp_path / "s", limits) as serving, serving.connect() as client:
            with pytest.raises(trio.BrokenResourceError):  # noqa: PT012 - any of the many sends may be the one
                for byte in b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 10_000:
                    await client.stream.send_all(bytes([byte]))
                    await trio.sleep(0.01)


async def test_a_response_that_nobody_reads_is_given_up(
    tmp_path: Path,
    autojump_clock: MockClock,  # noqa: ARG001 - a clock that jumps
) -> None:
    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await respond(send, b"x" * (8 << 20))

    limits = Limits(unread_seconds=SOON_SECONDS)
    with trio.fail_after(10):
        async with serving_app(app, tmp_path / "s", limits) as serving, serving.connect() as client:
            await client.begin("GET", "/")
            while not serving.server.open_connections:
                await trio.lowlevel.checkpoint()
            while serving.server.open_connections:  # noqa: ASYNC110 - nobody tells
                await trio.sleep(0.001)


# -- many clients ------------------------------------------------------------------------------------------------------


async def test_who_is_too_many_is_told_so(app: Recorder, tmp_path: Path) -> None:
    limits = Limits(connections=2)
    async with serving_app(app, tmp_path / "s", limits) as serving:
        async with serving.connect() as one, serving.connect() as two:
            assert (await one.get("/")).status == (await two.get("/")).status == 200
            answer = await serving.get("/")
            assert answer.problem == "too-many-connections"
            assert answer.headers["retry-after"] == "1"
            assert (await one.get("/")).status == 200
        while serving.server.open_connections:  # noqa: ASYNC110 - nobody tells
            await trio.sleep(0.001)
        assert (await serving.get("/")).status == 200
        assert serving.server.refused == 1


async def test_one_user_does_not_lock_the_others_out(
    app: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = Limits(connections=10, connections_per_user=1)
    async with serving_app(app, tmp_path / "s", limits) as serving:
        monkeypatch.setattr(serving.server, "_unbounded_users", frozenset())
        async with serving.connect() as one:
            assert (await one.get("/")).status == 200
            assert (await serving.get("/")).json["detail"] == f"user {os.geteuid()} has 1 connections already"
        while serving.server.open_connections:  # noqa: ASYNC110 - nobody tells
            await trio.sleep(0.001)
        assert (await serving.get("/")).status == 200


async def test_a_thousand_connections_at_once_harm_nobody(app: Recorder, tmp_path: Path) -> None:
    limits = Limits(connections=64, linger_seconds=0.2)
    statuses: list[int] = []

    async def one(serving: Serving) -> None:
        try:
            statuses.append((await serving.get("/")).status)
        except (trio.BrokenResourceError, AssertionError):
            statuses.append(0)  # beyond even those that are told

    with trio.fail_after(60):
        async with serving_app(app, tmp_path / "s", limits) as serving:
            for _ in range(4):
                async with trio.open_nursery() as nursery:
                    for _ in range(250):
                        nursery.start_soon(one, serving)
            assert (await serving.get("/")).status == 200
    assert len(statuses) == 1000
    assert set(statuses) <= {200, 503, 0}
    assert statuses.count(200) >= 64


async def test_running_out_of_descriptors_is_survived(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.socket.accept
    failures = iter([OSError(errno.EMFILE, "Too many open files")])

    def accept(self: socket.socket) -> tuple[socket.socket, object]:
        for error in failures:
            raise error
        return real(self)

    monkeypatch.setattr(socket.socket, "accept", accept)
    assert (await serving.get("/")).status == 200
