"""The same hand-off while the service's event loop serves the API too: requests and a stream, at a steady rate.

Both threads are on one CPU and the API's client, a process of its own, on another where there is one. Beside the
hand-off stand a bare ping-pong under the same load and one of an idle process.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Protocol, TypeVar

import trio

from kvmd.api.access import AccessRules
from kvmd.api.app import make_app
from kvmd.api.models import HostFacts
from kvmd.api.server.listen import listening
from kvmd.api.server.server import Server
from kvmd.api.services import Services
from kvmd.benchmark.api import Endless, Source
from kvmd.benchmark.measure import CannotMeasure
from kvmd.fleet.base import Event, MachineInfo

REQUESTS_A_SECOND = 200
EVENTS_A_SECOND = 1000

_TICK_SECONDS = 1 / REQUESTS_A_SECOND
_BURST = 10
_SETTLE_SECONDS = 0.5
_GET = b"GET %b HTTP/1.1\r\nHost: kvmd\r\n\r\n"


class Way(Protocol):
    """A way of handing over: see ``kvmd.benchmark.handoff``."""

    async def serve(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Answer until cancelled."""

    def close(self) -> None:
        """Give up what it holds."""


W = TypeVar("W", bound=Way)


def under_load(
    ways: Mapping[str, Callable[[], W]], ask: Callable[[W], float], *, rounds: int, cpu: int, client_cpu: int
) -> dict[str, list[float]]:
    """Let the ways take turns in one event loop that serves the API all the time; return what ``ask`` measured.

    Args:
        ways: by label.
        ask: hands over, in a thread of its own.
        rounds: how often.
        cpu: where the loop runs.
        client_cpu: where its client runs.

    Raises:
        CannotMeasure: the loop served nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        address = Path(folder) / "api"
        with _client(address, client_cpu):
            os.sched_setaffinity(0, {cpu})
            return trio.run(_take_turns, ways, ask, rounds, address)


async def _take_turns(
    ways: Mapping[str, Callable[[], W]], ask: Callable[[W], float], rounds: int, address: Path
) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {label: [] for label in ways}
    source = _Paced()
    services = Services(fleet=source, host=HostFacts(usable=True))  # type: ignore[arg-type]  # as much as is needed
    server = Server(make_app(services, AccessRules(own_uid=os.geteuid())))
    with listening(address) as listener:
        async with trio.open_nursery() as serving:
            serving.start_soon(server.serve, [listener])
            await trio.sleep(_SETTLE_SECONDS)
            for turn in range(rounds + 1):
                for label, make in ways.items():
                    way = make()
                    async with trio.open_nursery() as nursery:
                        await nursery.start(way.serve)
                        measured = await trio.to_thread.run_sync(ask, way)
                        nursery.cancel_scope.cancel()
                    way.close()
                    if turn:
                        values[label].append(measured)
            serving.cancel_scope.cancel()
    if not source.requests or not source.streams:
        raise CannotMeasure("the API's client did not get through to the loop")
    return values


class _PacedEvents(Endless):
    """A stream of so many events a second."""

    async def __anext__(self) -> Event:
        event = await super().__anext__()
        if not self.made % _BURST:
            await trio.sleep(_BURST / EVENTS_A_SECOND)
        return event


class _Paced(Source):
    """A fleet whose streams are paced; it counts what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.requests = self.streams = 0

    def machines(self) -> list[MachineInfo]:
        """Return one."""
        self.requests += 1
        return super().machines()

    @asynccontextmanager
    async def events(self, _name: str | None, *, last_id: str | None) -> AsyncIterator[Endless]:
        """Attach, as the protocol has it."""
        del last_id
        self.streams += 1
        await trio.lowlevel.checkpoint()
        yield _PacedEvents()


@contextmanager
def _client(address: Path, cpu: int) -> Iterator[None]:
    """Run a client in a process of its own: it waits for the API to be there."""
    child = os.fork()
    if child == 0:
        try:
            os.sched_setaffinity(0, {cpu})
            while not address.exists():
                time.sleep(0.01)
            with suppress(OSError):
                _ask_and_read(address)
        finally:
            os._exit(0)
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _ask_and_read(address: Path) -> None:
    with (
        socket.socket(socket.AF_UNIX) as asking,
        socket.socket(socket.AF_UNIX) as reading,
        selectors.DefaultSelector() as ready,
    ):
        for connection in (asking, reading):
            connection.connect(str(address))
            ready.register(connection, selectors.EVENT_READ)
        reading.sendall(_GET % b"/v1/events")
        due = time.perf_counter()
        while True:
            for key, _ in ready.select(max(0, due - time.perf_counter())):
                if not os.read(key.fd, 1 << 18):
                    return
            if time.perf_counter() >= due:
                asking.sendall(_GET % b"/v1/machines")
                due += _TICK_SECONDS
