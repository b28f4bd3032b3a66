"""A machine that has no room for one more client, for a while: nobody takes it for one that is at its end."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import trio
from trio.testing import MockClock

from kvmd.fleet.asking import ask
from kvmd.fleet.base import MachineInfo
from kvmd.fleet.entry import Entry
from kvmd.fleet.following import OutputFollower
from kvmd.fleet.machine_events import MachineEvents
from kvmd.machine_process.folder import MachineFolder, listen_in
from kvmd.machine_process.framing import Framed
from kvmd.machine_process.lifecycle import LifecycleEvent
from kvmd.machine_process.messages import (
    PROTOCOL,
    REQUEST_LIMIT,
    AskInfo,
    EventBatch,
    Greeting,
    OutputPiece,
    Refused,
    Request,
    Status,
)
from tests.fleet.conftest import spec

SECONDS = 30
BUSY = Refused("busy", "there are 192 who follow it already")
CREATED = LifecycleEvent(number=1, wall_ns=0, change="created", state="created")
NO_WORD = None
SILENCE = object()


@asynccontextmanager
async def machine(path: Path, *answers: object) -> AsyncIterator[tuple[Entry, trio.Event]]:
    """Be a machine that serves one connection with each of the answers, one after the other.

    ``NO_WORD`` hangs up before the greeting, ``SILENCE`` answers nothing. Yields the machine, and an event that is set
    once it was asked and does not answer.
    """
    folder = MachineFolder(os.open(path, os.O_RDONLY | os.O_DIRECTORY))
    listener = trio.SocketListener(trio.socket.from_stdlib_socket(listen_in(folder)))
    asked = trio.Event()

    async def serve() -> None:
        for answer in answers:
            async with await listener.accept() as stream:
                if answer is NO_WORD:
                    continue
                framed = Framed(stream, msgspec.msgpack.Decoder(Request), REQUEST_LIMIT)
                await framed.send(Greeting(protocol=PROTOCOL, machine="guest", pid=1, start_ticks=1))
                assert await framed.receive() is not None
                if answer is SILENCE:
                    asked.set()
                else:
                    await framed.send(answer)
                if answer is not BUSY:
                    assert await framed.receive() is None

    info = MachineInfo(
        name="guest",
        spec=spec(),
        state="running",
        owner_uid=0,
        created_ns=1,
        started_ns=None,
        pid=1,
        facts={},
        end=None,
    )
    entry = Entry(info, folder, -1)
    try:
        with trio.fail_after(SECONDS):
            async with listener, trio.open_nursery() as nursery:
                nursery.start_soon(serve)
                yield entry, asked
    finally:
        entry.close()


async def test_a_question_waits_for_room(tmp_path: Path) -> None:
    answer = Status("paused", None)
    async with machine(tmp_path, NO_WORD, NO_WORD, answer) as (entry, _):
        assert await ask(entry, "look", AskInfo(), Status) == answer


async def test_events_wait_for_room(
    tmp_path: Path,
    autojump_clock: MockClock,  # noqa: ARG001 - a clock that jumps
) -> None:
    async with machine(tmp_path, NO_WORD, BUSY, EventBatch(0, 0, [CREATED], [], 1, 0)) as (entry, _):
        events = MachineEvents(entry, None)
        assert not await events.open()
        happened = await events.next()
        assert happened is not None
        assert happened.data["change"] == "created"
        await events.aclose()


async def test_output_waits_for_room(
    tmp_path: Path,
    autojump_clock: MockClock,  # noqa: ARG001 - a clock that jumps
) -> None:
    async with machine(tmp_path, NO_WORD, BUSY, OutputPiece(0, 0, b"hello")) as (entry, _):
        follower = OutputFollower(entry, "console")
        part = await follower.read()
        assert part is not None
        assert part.data == b"hello"
        await follower.aclose()


async def test_a_stream_that_is_given_up_hangs_up(tmp_path: Path) -> None:
    # The machine waits for the end of the connection; without it this test would take as long as it may.
    async with machine(tmp_path, SILENCE) as (entry, asked), trio.open_nursery() as nursery:
        events = MachineEvents(entry, None)
        nursery.start_soon(events.open)
        await asked.wait()
        nursery.cancel_scope.cancel()
