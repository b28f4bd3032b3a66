"""The control socket's side of a machine: answers any number of clients, and lets none of them hold up the guest."""

from __future__ import annotations

import errno
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

import msgspec
import trio

from kvmd.conversion.ring import RecordReader
from kvmd.conversion_log import GATHER_SECONDS
from kvmd.errors import DeviceInUse, MachineStateError, NoSuchDevice
from kvmd.machine_process.framing import BadMessage, Framed
from kvmd.machine_process.host import MachineHost
from kvmd.machine_process.messages import (
    AGENT_PIECE,
    OUTPUT_PIECE,
    PROTOCOL,
    READ_LIMIT,
    RECORDS_LIMIT,
    REQUEST_LIMIT,
    TYPE_LIMIT,
    AgentSaid,
    AgentTold,
    AskBalloon,
    AskConversions,
    AskCounters,
    AskInfo,
    AskMap,
    AskMemory,
    AskPause,
    AskResume,
    AskStart,
    AskStop,
    AttachAgent,
    Attached,
    Conversions,
    EventBatch,
    FollowEvents,
    FollowOutput,
    Greeting,
    Info,
    Memory,
    MemoryMap,
    OutputPiece,
    PressPowerButton,
    Refused,
    Request,
    Status,
    TellAgent,
    Type,
    Typed,
)
from kvmd.memory.accessor import PrivateMemory
from kvmd.virtio.host_port import PortConnection

CLIENTS_LIMIT = 256
"""Connections at a time; more are closed as they come."""

STREAMS_LIMIT = 192
"""Of them those that follow something, and so stay: however many do, there is room for those who ask or act."""

BATCH_RECORDS = 256
"""Conversions in one message of a stream."""

_COUNTERS_SECONDS = 1.0
_REFUSED_SECONDS = 1.0
"""How long a client that sent nonsense may take to read what was wrong with it."""

_OUT_OF_SOMETHING = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
_BREATHER_SECONDS = 0.5


class ControlServer:
    """Serves one machine's control socket.

    Args:
        listening: the socket, bound and listening; taken over.
        pid: of this process.
        ticks: when it started.
    """

    def __init__(self, listening: socket.socket, pid: int, ticks: int) -> None:
        self._listening = listening
        self._pid = pid
        self._ticks = ticks
        self._clients = 0
        self._streams = 0
        self._typing = trio.StrictFIFOLock()
        self._room = trio.Event()

    async def serve(self, host: MachineHost) -> None:
        """Answer clients until cancelled."""
        token = trio.lowlevel.current_trio_token()
        host.machine.typed.set_wake(lambda: token.run_sync_soon(self._input_has_room, idempotent=True))
        listening = trio.socket.from_stdlib_socket(self._listening)
        listener = trio.SocketListener(listening)
        async with listener, trio.open_nursery() as nursery:
            while True:
                try:
                    stream = await listener.accept()
                except OSError as error:
                    if error.errno not in _OUT_OF_SOMETHING:
                        raise
                    host.log.warning("control-connection-refused", problem=error.strerror)
                    await trio.sleep(_BREATHER_SECONDS)
                    continue
                if self._clients >= CLIENTS_LIMIT:
                    host.log.warning("control-connection-refused", problem=f"there are {self._clients} already")
                    await trio.aclose_forcefully(stream)
                    continue
                self._clients += 1
                nursery.start_soon(self._serve_client, host, stream)

    async def _serve_client(self, host: MachineHost, stream: trio.SocketStream) -> None:
        framed = Framed(stream, msgspec.msgpack.Decoder(Request), REQUEST_LIMIT)
        client = _Client(self, host, framed, stream)
        try:
            await framed.send(
                Greeting(
                    protocol=PROTOCOL,
                    machine=host.machine.spec.name,
                    pid=self._pid,
                    start_ticks=self._ticks,
                )
            )
            await client.serve()
        except BadMessage as error:
            with trio.move_on_after(_REFUSED_SECONDS):
                with suppress(trio.BrokenResourceError):
                    await framed.send(Refused("bad-request", str(error)))
        except trio.BrokenResourceError:
            pass  # it hung up
        except Exception:
            host.log.exception("control-request-failed")
        finally:
            self._clients -= 1
            await trio.aclose_forcefully(stream)

    @contextmanager
    def stream(self) -> Iterator[bool]:
        """Count a client that follows something; false where there are too many already."""
        room = self._streams < STREAMS_LIMIT
        self._streams += room
        try:
            yield room
        finally:
            self._streams -= room

    async def type(self, host: MachineHost, data: bytes) -> None:
        """Give ``data`` to the console, one client at a time."""
        async with self._typing:
            rest = data
            while rest:
                self._room = trio.Event()
                rest = rest[host.machine.typed.offer(rest) :]
                if rest:
                    await self._room.wait()

    def _input_has_room(self) -> None:
        self._room.set()


class _Client:
    """One connection."""

    def __init__(
        self, server: ControlServer, host: MachineHost, framed: Framed[Request], stream: trio.SocketStream
    ) -> None:
        self._server = server
        self._host = host
        self._framed = framed
        self._stream = stream

    async def serve(self) -> None:
        while (request := await self._framed.receive()) is not None:
            match request:
                case FollowOutput() | FollowEvents():
                    await self._follow(request)
                case Type():
                    # It may wait for as long as the guest does not read: whoever hangs up meanwhile is gone.
                    typed = False
                    async with self._until_hangup():
                        await self._server.type(self._host, request.data[:TYPE_LIMIT])
                        typed = True
                    if not typed:
                        return
                    await self._framed.send(Typed())
                    continue
                case AttachAgent():
                    try:
                        connection = self._host.attach_agent()
                    except (NoSuchDevice, DeviceInUse) as error:
                        await self._framed.send(_refused(error))
                        continue
                    with connection:
                        await self._carry(connection)
                case _:
                    await self._framed.send(await self._answer(request))
                    continue
            return

    async def _follow(self, request: FollowOutput | FollowEvents) -> None:
        with self._server.stream() as room:
            if not room:
                await self._framed.send(Refused("busy", f"there are {STREAMS_LIMIT} who follow it already"))
                return
            async with self._until_hangup():
                if isinstance(request, FollowOutput):
                    await self._follow_output(request)
                else:
                    await self._follow_events(request)

    async def _answer(self, request: Request) -> msgspec.Struct:
        try:
            return await self._do(request)
        except MachineStateError as error:
            return Refused("state", str(error), action=error.action, needed=error.needed, found=error.found)
        except PrivateMemory as error:
            return Refused("private", str(error), gpa=error.gpa)
        except IndexError as error:
            return Refused("range", str(error))
        except (NoSuchDevice, DeviceInUse) as error:
            return _refused(error)

    async def _do(self, request: Request) -> msgspec.Struct:  # noqa: C901, PLR0911, PLR0912 - one case a request
        host = self._host
        machine = host.machine
        match request:
            case AskInfo():
                return Info(spec=machine.spec, state=host.state, started_ns=host.started_ns, facts=dict(machine.facts))
            case AskStart():
                await host.start()
            case AskPause():
                await host.pause()
            case AskResume():
                await host.resume()
            case AskStop():
                if host.state not in {"running", "paused"}:
                    raise MachineStateError("stop", needed="running or paused", found=host.state)
                host.stop()
            case PressPowerButton():
                host.press_power_button()
            case AskBalloon():
                return await host.balloon(request.target_bytes)
            case TellAgent():
                return Refused("bad-request", "no agent is attached to")
            case AskCounters():
                return await host.counters()
            case AskMap():
                ranges = [(range_.start, range_.end, state.value) for range_, state in machine.memory_map()]
                return MemoryMap(ranges, (machine.pinned.start, machine.pinned.end))
            case AskMemory():
                if request.size_bytes > READ_LIMIT:
                    raise IndexError(f"{request.size_bytes} bytes are more than are read at once: {READ_LIMIT}")
                # The memory lock may be held for as long as a chunk takes to convert.
                return Memory(await trio.to_thread.run_sync(machine.memory.read, request.gpa, request.size_bytes))
            case AskConversions():
                return self._recent(request)
            case _:
                raise AssertionError(request)
        return Status(state=host.state, started_ns=host.started_ns)

    def _recent(self, request: AskConversions) -> Conversions:
        ring = self._host.machine.records
        reader = RecordReader(ring, min(max(0, request.since), ring.appended))
        _, records = reader.take(min(max(1, request.limit), RECORDS_LIMIT))
        return Conversions(records, ring.appended)

    async def _follow_output(self, request: FollowOutput) -> None:
        output = self._host.console if request.output == "console" else self._host.log_output
        offset = min(max(0, request.offset), output.end)
        while not request.follow:
            piece = output.kept(offset, OUTPUT_PIECE)
            await self._framed.send(OutputPiece(*piece))
            offset = piece.end
            if not piece.data:
                return
        while True:
            piece = await output.read(offset, OUTPUT_PIECE)
            await self._framed.send(OutputPiece(*piece))
            offset = piece.end

    async def _carry(self, agent: PortConnection) -> None:
        """Carry bytes between the client and the agent until the client hangs up."""
        sending = trio.Lock()

        strange = False

        async def listen() -> None:
            while True:
                data = await agent.receive()
                async with sending:
                    await self._framed.send(AgentSaid(data))

        async def tell() -> None:
            nonlocal strange
            while isinstance(request := await self._framed.receive(), TellAgent):
                told = False
                async with self._until_hangup():
                    await agent.send(request.data[:AGENT_PIECE])
                    told = True
                if not told:
                    return
                async with sending:
                    await self._framed.send(AgentTold())
            strange = request is not None

        await self._framed.send(Attached())
        async with trio.open_nursery() as nursery:

            async def until_it_ends(carry: Callable[[], Awaitable[None]]) -> None:
                with suppress(trio.BrokenResourceError):
                    await carry()
                nursery.cancel_scope.cancel()

            nursery.start_soon(until_it_ends, listen)
            await until_it_ends(tell)
        if strange:
            raise BadMessage("the connection is the agent's: nothing else can be asked on it")

    async def _follow_events(self, request: FollowEvents) -> None:
        """Send what happens. The cursors stand still while the client does not read; the ring does not."""
        steps, ring = self._host.steps, self._host.machine.records
        known = steps.log.last if request.lifecycle is None else max(0, min(request.lifecycle, steps.log.last))
        since = ring.appended if request.conversion is None else max(0, min(request.conversion, ring.appended))
        reader = RecordReader(ring, since)
        counters_at = trio.current_time() + _COUNTERS_SECONDS
        first = True
        while True:
            lost_records, records = reader.take(BATCH_RECORDS)
            # Steps that came after conversions which are still to be sent have to wait for them.
            lost_steps, events = steps.log.after(known, until_ns=records[-1].wall_ns if reader.unread else None)
            if first or records or events or lost_records:
                since += lost_records + len(records)
                known = events[-1].number if events else known
                await self._framed.send(EventBatch(lost_steps, lost_records, events, records, known, since))
                first = False
                # A task switch for each record would cost the guest more than the record does.
                await trio.sleep(GATHER_SECONDS)
            if request.counters and trio.current_time() >= counters_at:
                counters_at = trio.current_time() + _COUNTERS_SECONDS
                await self._framed.send(await self._host.counters())
            if not reader.unread and steps.log.last == known:
                await self._wait_for_news(reader, counters_at if request.counters else float("inf"))

    async def _wait_for_news(self, reader: RecordReader, deadline: float) -> None:
        news = trio.Event()
        wake = news.set
        self._host.steps.follow(wake)
        reader.wake_once(wake)
        try:
            with trio.move_on_at(deadline):
                await news.wait()
        finally:
            reader.forget(wake)
            self._host.steps.forget(wake)

    @asynccontextmanager
    async def _until_hangup(self) -> AsyncIterator[None]:
        """Cancel the block when the client hangs up; what it sends meanwhile is left for later."""
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                try:
                    gone = not await self._stream.socket.recv(1, socket.MSG_PEEK)
                except OSError:
                    gone = True
                if gone:
                    nursery.cancel_scope.cancel()

            nursery.start_soon(watch)
            yield
            nursery.cancel_scope.cancel()


def _refused(error: NoSuchDevice | DeviceInUse) -> Refused:
    return Refused("no-device" if isinstance(error, NoSuchDevice) else "in-use", str(error))
