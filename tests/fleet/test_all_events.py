"""The stream of all machines' events, of machines that have ended: nothing here has a process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing

from kvmd.fleet.all_events import AllEvents, Newcomers
from kvmd.fleet.base import Event, EventStream, MachineEnd, MachineInfo
from kvmd.fleet.entry import Entry
from kvmd.fleet.places import START
from kvmd.machine_process.folder import LAST_CONVERSIONS, LastConversions, MachineFolder
from tests.conversion.records import RECORD
from tests.fleet.conftest import spec

CREATED_NS = 5
CONVERSIONS = 200
"""More than the stream keeps for a reader that does not read."""


@pytest.fixture
def ended(tmp_path: Path) -> Iterator[Entry]:
    """A machine that made many conversions before its end."""
    folder = MachineFolder(os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY))
    records = [msgspec.structs.replace(RECORD, sequence=number) for number in range(1, CONVERSIONS + 1)]
    folder.write(LAST_CONVERSIONS, LastConversions(CONVERSIONS, records))
    info = MachineInfo(
        name="guest",
        spec=spec(),
        state="running",
        owner_uid=0,
        created_ns=CREATED_NS,
        started_ns=None,
        pid=None,
        facts={},
        end=None,
    )
    entry = Entry(info, folder, -1)
    entry.end(MachineEnd("guest-exit", "", 0, None, 0), counters=None, steps=[], started_ns=None)
    yield entry
    entry.close()


async def read(stream: EventStream, count: int) -> list[Event]:
    with trio.fail_after(10):
        return [await anext(aiter(stream)) for _ in range(count)]


async def test_that_a_machine_is_deleted_comes_after_all_that_it_did(ended: Entry) -> None:
    async with AllEvents([ended], {CREATED_NS: START}).follow(Newcomers()) as stream:
        # The reader is slow: much of what the machine did waits for it when the machine is deleted.
        await trio.testing.wait_all_tasks_blocked()
        ended.forget()
        events = await read(stream, CONVERSIONS + 1)
    assert [event.kind for event in events] == ["conversion"] * CONVERSIONS + ["lifecycle"]
    assert events[-1].data == {"change": "deleted"}
    assert events[-1].id == "all"
