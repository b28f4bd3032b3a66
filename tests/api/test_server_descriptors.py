"""Descriptors that come with requests (unix(7), SCM_RIGHTS): one for each, and no others."""

from __future__ import annotations

import array
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
import trio.testing

from kvmd.api.server.asgi import PASSED_FILE, Receive, Scope, Send
from kvmd.api.server.limits import Limits
from tests.api.serving import Serving, respond, serving_app

LIMITS = Limits(linger_seconds=0.2, drain_seconds=1)
SOON_SECONDS = 0.05


class Reader:
    """Keeps what the passed files begin with."""

    def __init__(self) -> None:
        self.passed: list[bytes] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if PASSED_FILE in scope["extensions"]:
            self.passed.append(os.pread(scope["extensions"][PASSED_FILE], 100, 0))
        await respond(send, (await receive())["body"])


@pytest.fixture
def app() -> Reader:
    return Reader()


@pytest.fixture
async def serving(app: Reader, tmp_path: Path) -> AsyncIterator[Serving]:
    async with serving_app(app, tmp_path / "s", LIMITS) as serving:
        yield serving


def send_with_fds(stream: trio.SocketStream, data: bytes, fds: list[int]) -> None:
    """Send with descriptors; the socket's buffer has room."""
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
    with socket.socket(fileno=os.dup(stream.socket.fileno())) as plain:
        assert plain.sendmsg([data], ancillary) == len(data)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(b"image")
    return path


async def test_a_descriptor_comes_with_its_request(app: Reader, serving: Serving, file: Path) -> None:
    async with serving.connect() as client:
        with file.open("rb") as image:
            send_with_fds(client.stream, b"GET / HTTP/1.1\r\nHost: k\r\n\r\n", [image.fileno()])
        assert (await client.stream.receive_some(1000)).startswith(b"HTTP/1.1 200")
        assert app.passed == [b"image"]
        # It is that request's alone.
        assert (await client.get("/")).status == 200
        assert app.passed == [b"image"]


async def test_descriptors_that_nobody_asked_for_are_closed(app: Reader, serving: Serving, file: Path) -> None:
    with file.open("rb") as image:
        for data in (b"GET / HTTP/1.1\r\nHost: k\r\n\r\n", b"garbage\r\n\r\n", b"GET /half"):
            async with serving.connect() as client:
                send_with_fds(client.stream, data, [image.fileno()] * 5)
                client.stream.socket.shutdown(socket.SHUT_WR)
                assert await client.stream.receive_some(1000)
    assert app.passed == [b"image"]  # what is left open is found by the fixture of tests/conftest.py


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_no_client_can_use_up_the_daemons_descriptors(serving: Serving, file: Path) -> None:
    async with serving.connect() as client:
        with file.open("rb") as image:
            send_with_fds(client.stream, b"GET / HTTP/1.1\r\nHost: k\r\nX: ", [image.fileno()])
            await trio.testing.wait_all_tasks_blocked(SOON_SECONDS)
            before = open_descriptors()
            for _ in range(50):
                send_with_fds(client.stream, b"x", [image.fileno()] * 2)
            await trio.testing.wait_all_tasks_blocked(SOON_SECONDS)
            assert open_descriptors() == before
