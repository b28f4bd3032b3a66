"""kvmctl's other side: the real API over a fleet in memory, in a thread, and servers that are none of kvmd's."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import trio

from kvmd.api.access import AccessRules
from kvmd.api.app import make_app
from kvmd.api.server.limits import Limits
from kvmd.api.server.listen import listening
from kvmd.api.server.server import Server
from kvmd.api.services import Services
from tests.api.serving import HOST
from tests.fleet.fakes import FakeFleet, FakeGuest

T = TypeVar("T")

SECONDS = 60.0
"""How long a test waits for what should come at once, before it fails."""


class Daemon:
    """A daemon in a thread of this process; its machines outlive its restarts.

    Attributes:
        path: of its socket.
        fleet: its machines; to be touched through ``do`` alone.
    """

    def __init__(self, path: Path, *, rules: AccessRules | None = None, limits: Limits | None = None) -> None:
        self.path = path
        self.fleet = FakeFleet()
        self._rules = rules or AccessRules(own_uid=os.geteuid())
        self._limits = limits
        self._thread: threading.Thread | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._server: Server | None = None

    def start(self) -> None:
        """Serve; returns once connections are taken."""
        ready = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._serve, ready), name="daemon")
        self._thread.start()
        assert ready.wait(SECONDS)

    def stop(self) -> None:
        """Stop serving."""
        if self._thread is None:
            return
        assert self._server is not None
        self.do(self._server.stop)
        self._thread.join(SECONDS)
        assert not self._thread.is_alive()
        self._thread = self._token = None

    async def _serve(self, ready: threading.Event) -> None:
        app = make_app(Services(fleet=self.fleet, host=HOST), self._rules)
        self._server = Server(app, limits=self._limits)
        self._token = trio.lowlevel.current_trio_token()
        self.fleet.wake()  # whoever waited in an earlier loop has gone with it
        with listening(self.path) as listener:
            async with trio.open_nursery() as nursery:
                await nursery.start(self._server.serve, [listener])
                ready.set()

    def do(self, act: Callable[[], T]) -> T:
        """Do something in the daemon's loop, and return what it returns."""
        return trio.from_thread.run_sync(act, trio_token=self._token)

    def guest(self, name: str, act: Callable[[FakeGuest], T]) -> T:
        """Do something with a guest, in the daemon's loop."""
        return self.do(lambda: act(self.fleet.guest(name)))

    def until(self, holds: Callable[[FakeFleet], bool]) -> None:
        """Wait until something holds of the fleet: it is looked at again whenever a machine changes."""

        async def wait() -> None:
            with trio.fail_after(SECONDS):
                # Not all that a test waits for wakes those who wait for the fleet: input, say, does not.
                while not holds(self.fleet):  # noqa: ASYNC110 - as said
                    await trio.sleep(0.002)

        trio.from_thread.run(wait, trio_token=self._token)

    def until_asked(self) -> None:
        """Wait until somebody is connected."""
        self.until(lambda _fleet: self._server is not None and self._server.open_connections > 0)


@contextmanager
def daemon_at(path: Path, **settings: Any) -> Iterator[Daemon]:
    """Run a daemon."""
    daemon = Daemon(path, **settings)
    daemon.start()
    try:
        yield daemon
    finally:
        daemon.stop()


@contextmanager
def stranger(path: Path, *answers: bytes, hold: bool = False) -> Iterator[list[bytes]]:
    """Run a server that answers each connection with the next of some bytes, whatever it is asked, and closes it.

    Args:
        path: of its socket.
        answers: one for each connection; the last is for all that follow.
        hold: whether connections stay open after their answer.

    Yields:
        What it was asked, by connection.
    """
    asked: list[bytes] = []
    held: list[socket.socket] = []
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(os.fsencode(path))
    listener.listen()

    def serve() -> None:
        while True:
            connection, _ = listener.accept()
            data = connection.recv(65536)
            if data == b"over":
                connection.close()
                return
            answer = answers[min(len(asked), len(answers) - 1)]
            asked.append(data)
            with suppress(OSError):  # it had enough
                connection.sendall(answer)
            if hold:
                held.append(connection)
            else:
                connection.close()

    thread = threading.Thread(target=serve, name="stranger")
    thread.start()
    try:
        yield asked
    finally:
        with socket.socket(socket.AF_UNIX) as last:
            last.connect(os.fsencode(path))
            last.sendall(b"over")
        thread.join(SECONDS)
        listener.close()
        for connection in held:
            connection.close()


def http(body: bytes, *, status: str = "200 OK", kind: str = "application/json", more: str = "") -> bytes:
    """Return an answer with its header."""
    return f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\n{more}Content-Length: {len(body)}\r\n\r\n".encode() + body
