"""Looking into a machine: its process answers while it lives, and what it left does after that."""

from __future__ import annotations

from collections.abc import Sequence

import structlog
import trio

from kvmd.conversion.hottest import HotRange
from kvmd.errors import MachineStateError
from kvmd.fleet.asking import ask
from kvmd.fleet.base import Balloon, Counters, MemoryMap
from kvmd.fleet.entry import Entry
from kvmd.log import conversion_event
from kvmd.machine_process.folder import BadFile, LastConversions
from kvmd.machine_process.kept_conversions import conversions_left
from kvmd.machine_process.messages import (
    READ_LIMIT,
    RECORDS_LIMIT,
    AskBalloon,
    AskConversions,
    AskCounters,
    AskMap,
    AskMemory,
    Conversions,
    CounterValues,
    Memory,
)
from kvmd.machine_process.messages import Balloon as BalloonAnswer
from kvmd.machine_process.messages import MemoryMap as MapAnswer
from kvmd.ranges import GpaRange, PageState

READ_MEMORY_LIMIT = 16 << 20
"""Bytes of guest memory that one call reads, at most."""

_BEYOND = 1 << 62
"""A sequence that no machine reaches."""

_NO_TIMES = (0.0, 0.0, 0.0, 0.0)

_log: structlog.stdlib.BoundLogger = structlog.get_logger("kvmd.fleet")


async def counters(entry: Entry) -> Counters:
    """Return what the machine did so far; of one that ended without a word, nothing."""
    values = entry.end_counters
    if not entry.ended:
        try:
            values = await ask(entry, "count", AskCounters(), CounterValues)
        except MachineStateError:
            values = entry.end_counters
    if values is None:
        values = CounterValues([], 0, 0, _NO_TIMES, _NO_TIMES, _NO_TIMES, 0)
    await trio.lowlevel.checkpoint()
    return counters_of(values)


async def balloon(entry: Entry, target_bytes: int | None = None) -> Balloon:
    """Return what memory the guest does without, after asking it for ``target_bytes``, if any."""
    return _balloon_of(await ask(entry, "reach the balloon", AskBalloon(target_bytes), BalloonAnswer))


def counters_of(values: CounterValues) -> Counters:
    """Return what a machine's process says of itself as the fleet's word for it."""
    return Counters(
        requests={(cause, to, outcome): requests for cause, to, outcome, requests in values.requests},
        shared_bytes=values.shared_bytes,
        private_bytes=values.private_bytes,
        waiting_us=values.waiting_us,
        applying_us=values.applying_us,
        discarding_us=values.discarding_us,
        lost=values.lost,
        hottest=tuple(HotRange(*hot) for hot in values.hottest),
        balloon=None if values.balloon is None else _balloon_of(values.balloon),
        held_back_us=values.held_back_us,
    )


def _balloon_of(answer: BalloonAnswer) -> Balloon:
    return Balloon(answer.target_bytes, answer.actual_bytes, answer.given_back_bytes, answer.held_bytes)


async def memory_map(entry: Entry) -> MemoryMap:
    """Return the state of all memory."""
    answer = await ask(entry, "show the memory of it", AskMap(), MapAnswer)
    ranges = [(GpaRange(start, end), PageState(state)) for start, end, state in answer.ranges]
    return MemoryMap(ranges, None if answer.pinned is None else GpaRange(*answer.pinned))


async def read_memory(entry: Entry, gpa: int, size_bytes: int) -> bytes:
    """Return shared memory. Raises PrivateMemory where a page of it is private, ValueError outside memory."""
    if gpa < 0 or size_bytes < 1 or gpa + size_bytes > entry.info.spec.memory:
        raise ValueError(f"{size_bytes} bytes at {gpa:#x} are not within memory")
    if size_bytes > READ_MEMORY_LIMIT:
        raise ValueError(f"{size_bytes} bytes are more than are read at once: {READ_MEMORY_LIMIT}")
    data = bytearray()
    for at in range(gpa, gpa + size_bytes, READ_LIMIT):
        request = AskMemory(at, min(READ_LIMIT, gpa + size_bytes - at))
        data += (await ask(entry, "read the memory of it", request, Memory)).data
    return bytes(data)


async def conversions(entry: Entry, *, since: int, limit: int) -> Sequence[dict[str, object]]:
    """Return the recent conversions with a sequence above ``since``, oldest first, at most ``limit``."""
    found: list[dict[str, object]] = []
    while len(found) < limit and not entry.ended:
        request = AskConversions(since, min(limit - len(found), RECORDS_LIMIT))
        try:
            records = (await ask(entry, "list conversions of it", request, Conversions)).records
        except MachineStateError:
            break  # it ended just now
        if not records:
            return found
        found += [conversion_event(record, entry.name) for record in records]
        since = records[-1].sequence
    await trio.lowlevel.checkpoint()
    if entry.ended and len(found) < limit:
        last = conversions_of_ended(entry)
        rest = [] if last is None else [record for record in last.records if record.sequence > since]
        found += [conversion_event(record, entry.name) for record in rest[: limit - len(found)]]
    return found


async def last_conversion(entry: Entry) -> int:
    """Return the sequence of the last conversion; 0 where there was none."""
    if not entry.ended:
        try:
            return (await ask(entry, "list conversions of it", AskConversions(_BEYOND, 1), Conversions)).last
        except MachineStateError:
            pass  # it ended just now
    await trio.lowlevel.checkpoint()
    last = conversions_of_ended(entry)
    return 0 if last is None else last.count


def conversions_of_ended(entry: Entry) -> LastConversions | None:
    """Return the conversions that a machine which has ended left; None where there are none, or no file can be read."""
    if entry.deleted:
        return None
    try:
        return conversions_left(entry.folder)
    except (BadFile, OSError) as error:
        _log.error("machine-file-unusable", machine=entry.name, problem=str(error))
        return None
