"""The API over its Unix socket: a small GET, and events a second for readers of whom one is stalled.

Each server is a process of its own, as the daemon is. Beside the API's GET answers a hand-written h11 server, the least
that HTTP over trio costs in Python, the same bytes; between the two stands this server with an app that does nothing.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import cast

import h11
import trio

from kvmd.api.access import AccessRules
from kvmd.api.app import make_app
from kvmd.api.models import HostFacts
from kvmd.api.server.asgi import Receive, Scope, Send
from kvmd.api.server.listen import listening
from kvmd.api.server.server import Server
from kvmd.api.services import Services
from kvmd.benchmark.measure import Fact, Options, Ratio, Report, take_turns
from kvmd.fleet.base import Counters, Event, Fleet, MachineInfo, MemoryMap
from kvmd.guests import GUESTS
from kvmd.ranges import GpaRange, PageState
from kvmd.spec.machine import MachineSpec

TARGET = 2.0
"""What a small GET may cost at most, in echoes."""

_ECHO = "h11 echo"
_ALONE = "a GET, no reader"
_STALLED = "10 readers, 1 more stalled"
_GET = b"GET %b HTTP/1.1\r\nHost: kvmd\r\n\r\n"
_ONE = "/v1/machines/pingpong"
_TARGETS = {
    "GET /v1/host": b"/v1/host",
    "GET /v1/machines, one there": b"/v1/machines",
    "GET a machine": _ONE.encode(),
    "GET its counters": f"{_ONE}/counters".encode(),
    "GET its memory map": f"{_ONE}/memory/map".encode(),
    "GET its conversions, one there": f"{_ONE}/conversions".encode(),
    "GET its conversions?limit=1&to=shared": f"{_ONE}/conversions?limit=1&to=shared".encode(),
}
"""Small GETs, and what each asks for."""

_BESIDES = {"GET its conversions?limit=1&limit=1, through FastAPI": f"{_ONE}/conversions?limit=1&limit=1".encode()}
"""What is measured without a target."""

_BODY = b"x" * 700
"""About what a machine's answer has."""

_REQUESTS = 300
"""In one round: some 100 milliseconds."""

_REQUESTS_AMONG_READERS = 30
_STREAM_SECONDS = 1.0
_BURST = 64
"""Events that come without a pause, as a batch of a machine's ring does."""

_CONVERSION: dict[str, object] = {
    "sequence": 1,
    "time": "2026-11-22T12:03:39.715725Z",
    "monotonic_ns": 5741600515777,
    "machine": "pingpong",
    "vcpu": 0,
    "cause": "implicit",
    "gpa": "0x200000",
    "size": 4096,
    "from": "private",
    "to": "shared",
    "outcome": "converted",
    "merged": 1,
    "waiting_us": 314.39,
    "applying_us": 403.479,
    "discarding_us": 20.082,
}


def measure(options: Options) -> Report:
    """Measure GETs, then streams."""
    report = Report("api", "the control API over its Unix socket")
    with tempfile.TemporaryDirectory() as name, ExitStack() as servers:
        folder = Path(name)
        things: dict[str, Callable[[], float]] = {}
        for number, (serve, targets) in enumerate(
            (
                (_serve_echo, {_ECHO: b"/"}),
                (_serve_plain, {"this server, an app that does nothing": b"/"}),
                (_serve_api, {**_TARGETS, **_BESIDES}),
            )
        ):
            address = folder / str(number)
            servers.enter_context(_process(serve, address))
            things |= {label: partial(_round, address, path) for label, path in targets.items()}
        gets = take_turns(things, rounds=options.rounds(40), unit="us")
        streams = take_turns(
            {
                label: partial(_events, address, readers, stalled)
                for label, readers, stalled in (("1 reader", 1, 0), ("10 readers", 10, 0), (_STALLED, 10, 1))
            },
            rounds=options.rounds(5),
            unit="events/s",
        )
        latencies = take_turns(
            {
                label: partial(_latency, address, readers, stalled)
                for label, readers, stalled in (
                    (_ALONE, 0, 0),
                    ("a GET, 1 reader", 1, 0),
                    ("a GET, 10 readers", 10, 0),
                    (f"a GET, {_STALLED}", 10, 1),
                )
            },
            rounds=options.rounds(10),
            unit="us",
        )
    echo = gets.pop(_ECHO)
    for label, series in gets.items():
        report.ratios.append(Ratio(series, echo, TARGET if label in _TARGETS else None))
    # Readers beside readers with a stalled one: above 1, the stalled one costs the others something.
    report.ratios.append(Ratio(streams["10 readers"], streams[_STALLED]))
    report.facts.extend(Fact(series) for series in streams.values())
    report.compare(latencies, _ALONE)
    report.notes.append(
        f"GETs: {_REQUESTS} a round on one kept connection, over a fleet in memory: of a real one counters, map and "
        "conversions ask the machine's process besides. Events: what all readers together get of streams that "
        "always have another one; who reads nothing fills its socket's buffer and then costs nothing. "
        "A GET with readers: while these streams go on in the same loop"
    )
    return report


# -- GETs --------------------------------------------------------------------------------------------------------------


def _round(address: Path, path: bytes, requests: int = _REQUESTS) -> float:
    """Return microseconds for one request."""
    request = _GET % path
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(address))
        _ask(connection, request, requests // 15)
        started_ns = time.perf_counter_ns()
        _ask(connection, request, requests)
        return (time.perf_counter_ns() - started_ns) / 1000 / requests


def _latency(address: Path, readers: int, stalled: int) -> float:
    """Return microseconds for one request while a process reads streams, the stalled ones of which it never reads."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(readable)
            _read_streams(address, readers, stalled, writable)
        finally:
            os._exit(1)
    os.close(writable)
    try:
        if not os.read(readable, 1):
            raise RuntimeError("the streams' reader did not begin")
        time.sleep(_STREAM_SECONDS / 5)  # the server has seen by then that the one before has gone
        return _round(address, _TARGETS["GET /v1/machines, one there"], _REQUESTS_AMONG_READERS)
    finally:
        os.close(readable)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _read_streams(address: Path, readers: int, stalled: int, begun: int) -> None:
    connections = [socket.socket(socket.AF_UNIX) for _ in range(readers + stalled)]
    with selectors.DefaultSelector() as reading:
        for number, connection in enumerate(connections):
            connection.connect(str(address))
            connection.sendall(_GET % b"/v1/events")
            if number < readers:
                reading.register(connection, selectors.EVENT_READ)
        os.write(begun, b"!")
        while True:
            for key, _ in reading.select():
                os.read(key.fd, 1 << 18)


def _ask(connection: socket.socket, request: bytes, times: int) -> None:
    for _ in range(times):
        connection.sendall(request)
        if not connection.recv(65536).startswith(b"HTTP/1.1 200"):
            raise RuntimeError("the server did not answer as it should")


@contextmanager
def _process(serve: Callable[[trio.socket.SocketType], Awaitable[None]], address: Path) -> Iterator[None]:
    """Run a server in a process of its own."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:

        async def main() -> None:
            with listening(address) as listener:
                os.write(writable, b"!")
                await serve(listener)

        try:
            trio.run(main)
        finally:
            os._exit(1)
    os.read(readable, 1)
    os.close(readable)
    os.close(writable)
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


async def _serve_echo(listener: trio.socket.SocketType) -> None:
    async with trio.open_nursery() as clients:
        while True:
            accepted, _ = await listener.accept()
            clients.start_soon(_echo, trio.SocketStream(accepted))


async def _echo(stream: trio.SocketStream) -> None:
    http = h11.Connection(h11.SERVER)
    async with stream:
        while True:
            while (event := http.next_event()) is h11.NEED_DATA:
                http.receive_data(await stream.receive_some(65536))
            if isinstance(event, h11.ConnectionClosed):
                return
            while not isinstance(http.next_event(), h11.EndOfMessage):
                pass
            headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(_BODY))]
            data = http.send(h11.Response(status_code=200, headers=headers)) or b""
            data += http.send(h11.Data(data=_BODY)) or b""
            data += http.send(h11.EndOfMessage()) or b""
            await stream.send_all(data)
            http.start_next_cycle()


async def _serve_plain(listener: trio.socket.SocketType) -> None:
    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(_BODY))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": _BODY})

    await Server(app).serve([listener])


async def _serve_api(listener: trio.socket.SocketType) -> None:
    await Server(_api(Source())).serve([listener])


def _api(source: Source) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    services = Services(fleet=cast("Fleet", source), host=HostFacts(usable=True))
    return make_app(services, AccessRules(own_uid=os.geteuid()))


# -- events ------------------------------------------------------------------------------------------------------------


class Endless:
    """A stream that always has another event, like a guest that converts without a pause."""

    place = "0"

    def __init__(self) -> None:
        self.made = 0

    def __aiter__(self) -> Endless:
        return self

    async def __anext__(self) -> Event:
        self.made += 1
        if not self.made % _BURST:
            await trio.lowlevel.checkpoint()
        return Event(id=f"{self.made:010}", kind="conversion", machine="pingpong", data=_CONVERSION)


class Source:
    """As much of a fleet as is measured."""

    # Named when routes are made, never called.
    start = pause = resume = stop = kill = press_power_button = console = console_output = log_output = None

    def __init__(self) -> None:
        facts: dict[str, object] = {
            "vcpus": 4,
            "protection": "emulated",
            "tripwire": "guest_memfd",
            "accelerator": "kvm",
        }
        self._info = MachineInfo(
            name="pingpong",
            spec=MachineSpec(image=GUESTS["pingpong"].path, name="pingpong"),
            state="running",
            owner_uid=0,
            created_ns=1_700_000_000_000_000_000,
            started_ns=1_700_000_001_000_000_000,
            pid=1234,
            facts=facts,
            end=None,
        )

    def machines(self) -> list[MachineInfo]:
        """Return one."""
        return [self._info]

    def machine(self, _name: str) -> MachineInfo:
        """Return it."""
        return self._info

    async def counters(self, _name: str) -> Counters:
        """Return what a machine that converts both ways says."""
        await trio.lowlevel.checkpoint()
        times = (12.5, 30.0, 80.25, 900.0)
        requests = {("implicit", to, "converted"): 100_000 for to in ("private", "shared")}
        return Counters(requests, 1 << 20, 63 << 20, times, times, times, 0)

    async def memory_map(self, _name: str) -> MemoryMap:
        """Return three ranges."""
        await trio.lowlevel.checkpoint()
        edges = (0, 2 << 20, 3 << 20, 64 << 20)
        states = (PageState.PRIVATE, PageState.SHARED, PageState.PRIVATE)
        return MemoryMap([(GpaRange(*ends), state) for ends, state in zip(pairwise(edges), states, strict=True)])

    async def conversions(self, _name: str, *, since: int, limit: int) -> list[dict[str, object]]:
        """Return one."""
        await trio.lowlevel.checkpoint()
        return [_CONVERSION][: limit if not since else 0]

    @asynccontextmanager
    async def events(self, _name: str | None, *, last_id: str | None) -> AsyncIterator[Endless]:
        """Attach, as the protocol has it."""
        del last_id
        await trio.lowlevel.checkpoint()
        yield Endless()


def _events(address: Path, readers: int, stalled: int) -> float:
    """Return events a second that all readers together got."""
    with ExitStack() as stack:
        connections = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(readers + stalled)]
        for connection in connections:
            connection.connect(str(address))
            connection.sendall(_GET % b"/v1/events")
        reading = selectors.DefaultSelector()
        stack.callback(reading.close)
        for connection in connections[:readers]:
            reading.register(connection, selectors.EVENT_READ)
        _count(reading, _STREAM_SECONDS / 5)
        return _count(reading, _STREAM_SECONDS)


def _count(reading: selectors.DefaultSelector, seconds: float) -> float:
    count = 0
    started = time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        for key, _ in reading.select(0.1):
            count += cast("socket.socket", key.fileobj).recv(1 << 18).count(b"event: ")
    return count / elapsed
