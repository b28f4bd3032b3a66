"""The control socket of a machine in this process: good clients, and those that are broken or hostile."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import structlog
import trio
from trio.testing import MockClock

from kvmd.errors import MachineStateError
from kvmd.guests import GUESTS
from kvmd.log_buffer import LogBuffer
from kvmd.machine_process.client import ControlClient, HungUp
from kvmd.machine_process.control import CLIENTS_LIMIT, STREAMS_LIMIT, ControlServer
from kvmd.machine_process.folder import END, EndFile, MachineFolder, listen_in
from kvmd.machine_process.framing import BadMessage
from kvmd.machine_process.host import MachineHost
from kvmd.machine_process.messages import (
    PROTOCOL,
    READ_LIMIT,
    REQUEST_LIMIT,
    AskConversions,
    AskCounters,
    AskInfo,
    AskMemory,
    AskPause,
    AskStart,
    AskStop,
    Conversions,
    CounterValues,
    EventBatch,
    FollowEvents,
    FollowOutput,
    Info,
    Memory,
    OutputPiece,
    Refused,
    Status,
    Type,
    Typed,
)
from kvmd.memory.accessor import PrivateMemory
from kvmd.spec.machine import MachineSpec
from tests.fleet.fake_machine import FIRST_FREE, FakeMachine

SECONDS = 120


@asynccontextmanager
async def hosted(
    path: Path, *, name: str = "guest", linux: bool = False, shutdown_seconds: float = SECONDS
) -> AsyncIterator[MachineFolder]:
    """Host a fake machine until the block ends."""
    kind = {"kernel" if linux else "image": GUESTS["echo"].path}
    spec = MachineSpec(**kind, name=name, memory=4 << 20)  # type: ignore[arg-type]
    with MachineFolder.open(path) as folder, trio.fail_after(SECONDS):
        log = structlog.get_logger()
        buffer = LogBuffer(is_terminal=False)
        host = MachineHost(FakeMachine(spec), folder, log_buffer=buffer, log=log, shutdown_seconds=shutdown_seconds)
        server = ControlServer(listen_in(folder), os.getpid(), 1)
        ready = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(host.run, server.serve, ready.set)
            await ready.wait()
            yield folder
            host.stop()


@asynccontextmanager
async def raw(folder: MachineFolder) -> AsyncIterator[trio.SocketStream]:
    """Connect without speaking the protocol."""
    async with await trio.open_unix_socket(folder.control) as stream:
        yield stream


@pytest.mark.parametrize(
    ("name", "signals", "seconds", "reason"),
    [
        ("guest", 1, 1000.0, "guest-power-off"),
        ("stubborn", 1, 10.0, "operator"),
        ("stubborn", 2, 1000.0, "operator"),
    ],
)
async def test_a_signal_shuts_a_guest_down_that_has_a_power_button(
    tmp_path: Path, mock_clock: MockClock, name: str, signals: int, seconds: float, reason: str
) -> None:
    mock_clock.rate = 1
    async with (
        hosted(tmp_path, name=name, linux=True, shutdown_seconds=seconds) as folder,
        await ControlClient.connect(folder) as client,
        await ControlClient.connect(folder) as console,
    ):
        await client.ask(AskStart(), Status)
        await console.send(FollowOutput("console", 0))
        said = b""
        for _ in range(signals):
            os.kill(os.getpid(), signal.SIGTERM)
            while name == "stubborn" and b"no\n" not in said:
                answer = await console.receive()
                assert isinstance(answer, OutputPiece)
                said += answer.data
        if seconds < SECONDS:
            # By now it is known that the guest says no: the time that it has left is over.
            mock_clock.jump(seconds)
        while await client.receive() is not None:
            pass
    with MachineFolder.open(tmp_path) as folder:
        end = folder.read(END, EndFile)
    assert end is not None
    assert end.reason == reason


async def test_the_socket_is_for_its_owner_alone(tmp_path: Path) -> None:
    async with hosted(tmp_path) as folder:
        mode = os.stat("control", dir_fd=folder.fd).st_mode
        assert mode & 0o777 == 0o600


async def test_questions_and_answers(tmp_path: Path) -> None:
    async with hosted(tmp_path) as folder, await ControlClient.connect(folder) as client:
        assert (client.greeting.protocol, client.greeting.machine) == (PROTOCOL, "guest")
        info = await client.ask(AskInfo(), Info)
        assert (info.spec.name, info.state, info.started_ns) == ("guest", "created", None)
        for request in (AskPause(), AskStop()):
            with pytest.raises(MachineStateError, match="this one is created"):
                await client.ask(request, Status)
        assert (await client.ask(AskStart(), Status)).state == "running"
        with pytest.raises(MachineStateError, match="cannot start: needs a machine that is created"):
            await client.ask(AskStart(), Status)
        await client.ask(Type(b"s"), Typed)
        async with await ControlClient.connect(folder) as follower:
            await follower.send(FollowEvents(0, 0))
            sequences: list[int] = []
            while not sequences:
                batch = await follower.receive()
                assert isinstance(batch, EventBatch)
                sequences += [record.sequence for record in batch.conversions]
        assert (await client.ask(AskMemory(FIRST_FREE, 4096), Memory)).data == bytes(4096)
        with pytest.raises(PrivateMemory):
            await client.ask(AskMemory(0, 1), Memory)
        for gpa, size_bytes in ((-1, 1), (0, READ_LIMIT + 1), (1 << 60, 1)):
            with pytest.raises(ValueError, match=r"within memory|at once"):
                await client.ask(AskMemory(gpa, size_bytes), Memory)
        assert (await client.ask(AskCounters(), CounterValues)).shared_bytes == 4096
        for since, limit, expected in ((0, 9, [1]), (1, 9, []), (-5, -5, [1]), (10**17, 10**17, [])):
            found = await client.ask(AskConversions(since, limit), Conversions)
            assert [record.sequence for record in found.records] == expected


@pytest.mark.parametrize(
    "sent",
    [
        b"\xff\xff\xff\xff",
        (REQUEST_LIMIT + 1).to_bytes(4, "big"),
        b"\0\0\0\1\xc1",
        b"\0\0\0\0",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\0\0\0\5hello",
        b"\0\0\0\x08\x81\xa4type\xa1x"[:12],
        (65000).to_bytes(4, "big") + b"\x91" * 65000,
    ],
)
async def test_nonsense_is_answered_and_hung_up_on(tmp_path: Path, sent: bytes) -> None:
    async with hosted(tmp_path) as folder:
        async with raw(folder) as stream:
            await stream.send_all(sent)
            received = b""
            while data := await stream.receive_some(65536):
                received += data
        size = int.from_bytes(received[:4], "big")
        rest = received[4 + size :]
        refused = msgspec.msgpack.decode(rest[4:], type=Refused)
        assert refused.kind == "bad-request"
        async with await ControlClient.connect(folder) as client:
            assert (await client.ask(AskInfo(), Info)).state == "created"


async def test_half_a_message_and_silence_hold_up_nobody(tmp_path: Path) -> None:
    async with hosted(tmp_path) as folder, raw(folder) as half, raw(folder), raw(folder) as gone:
        await half.send_all(b"\0\0\1")
        await gone.send_all(b"\0\0\1\0abc")
        await gone.aclose()
        async with await ControlClient.connect(folder) as client:
            assert (await client.ask(AskStart(), Status)).state == "running"


async def test_too_many_clients_are_sent_away_until_some_go(tmp_path: Path) -> None:
    async with hosted(tmp_path) as folder:
        clients = [await ControlClient.connect(folder) for _ in range(CLIENTS_LIMIT)]
        with pytest.raises(HungUp):
            await ControlClient.connect(folder)
        for client in clients:
            await client.aclose()
        while True:
            try:
                async with await ControlClient.connect(folder) as client:
                    assert (await client.ask(AskInfo(), Info)).state == "created"
                break
            except HungUp:  # the server has not seen all of them go yet
                await trio.lowlevel.checkpoint()


async def test_those_who_follow_leave_room_for_those_who_ask(tmp_path: Path) -> None:
    async with hosted(tmp_path) as folder:
        followers = []
        for number in range(STREAMS_LIMIT + 1):
            follower = await ControlClient.connect(folder)
            followers.append(follower)
            await follower.send(FollowEvents(None, None) if number % 2 else FollowOutput("console", 0, follow=True))
            if number == STREAMS_LIMIT:
                assert await follower.receive() == Refused("busy", f"there are {STREAMS_LIMIT} who follow it already")
                assert await follower.receive() is None
        async with await ControlClient.connect(folder) as client:
            assert (await client.ask(AskStart(), Status)).state == "running"
        for follower in followers:
            await follower.aclose()
        # Their room is free again as soon as the machine has seen them go.
        while True:
            async with await ControlClient.connect(folder) as client:
                await client.send(FollowEvents(None, None))
                if isinstance(await client.receive(), EventBatch):
                    break


async def test_input_waits_for_a_guest_that_does_not_read(tmp_path: Path) -> None:
    async with hosted(tmp_path) as folder, await ControlClient.connect(folder) as client:
        await client.ask(Type(b"." * 4096), Typed)
        async with await ControlClient.connect(folder) as impatient:
            await impatient.send(Type(b"lost"))
            with trio.move_on_after(0.05):
                pytest.fail(f"taken by nobody: {await impatient.receive()}")
        # Whoever hangs up takes the turn with it, and nothing of it is typed.
        await client.ask(AskStart(), Status)
        await client.ask(Type(b"last"), Typed)
        await client.send(FollowOutput("console", 0))
        said = b""
        while not said.endswith(b"last"):
            piece = await client.receive()
            assert isinstance(piece, OutputPiece)
            said += piece.data
        assert b"lost" not in said


async def test_a_place_beyond_the_end_counts_as_the_end(tmp_path: Path) -> None:
    async with hosted(tmp_path) as folder, await ControlClient.connect(folder) as client:
        await client.send(FollowEvents(10**9, 10**9))
        batch = await client.receive()
        assert batch == EventBatch(0, 0, [], [], 1, 0)


async def test_another_protocol_is_refused(tmp_path: Path) -> None:
    with MachineFolder.open(tmp_path) as folder:
        listening = trio.socket.from_stdlib_socket(listen_in(folder))
        async with trio.SocketListener(listening) as listener, trio.open_nursery() as nursery:

            async def greet() -> None:
                async with await listener.accept() as stream:
                    data = msgspec.msgpack.encode(
                        {"type": "greeting", "protocol": 99, "machine": "x", "pid": 1, "start_ticks": 1}
                    )
                    await stream.send_all(len(data).to_bytes(4, "big") + data)

            nursery.start_soon(greet)
            with pytest.raises(BadMessage, match="another protocol"):
                await ControlClient.connect(folder)
