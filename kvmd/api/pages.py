"""Pages of a machine's memory map and of its conversions, as the API's answers have them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import cast

from kvmd.api.filters import ConversionFilter
from kvmd.fleet.base import Fleet, MemoryMap
from kvmd.ranges import GpaRange, PageState

RANGES_DEFAULT = 4096
CONVERSIONS_DEFAULT = 256
ALL = ConversionFilter({})

_SCAN_PAGE = 1024
_SCAN_LIMIT = 16384
"""Records that one request looks at, at most, for those that its filters let through."""


async def memory_map(fleet: Fleet, name: str, start: int = 0, limit: int = RANGES_DEFAULT) -> dict[str, object]:
    """Return one page of a machine's map: the ranges from the one that holds ``start``, at most ``limit``."""
    found = await fleet.memory_map(name)
    rest = [entry for entry in _split(found) if entry[0].end > start]
    shown = [
        {"gpa": hex(range_.start), "size": range_.size_bytes, "state": state.value, "pinned": pinned}
        for range_, state, pinned in rest[:limit]
    ]
    return {"ranges": shown, "next": hex(rest[limit][0].start) if len(rest) > limit else None}


def _split(found: MemoryMap) -> Iterator[tuple[GpaRange, PageState, bool]]:
    """Yield ranges that are pinned as a whole, or not at all."""
    pinned = found.pinned
    for range_, state in found.ranges:
        if pinned is None or pinned.end <= range_.start or range_.end <= pinned.start:
            yield range_, state, False
            continue
        if range_.start < pinned.start:
            yield GpaRange(range_.start, pinned.start), state, False
        yield GpaRange(max(range_.start, pinned.start), min(range_.end, pinned.end)), state, True
        if pinned.end < range_.end:
            yield GpaRange(pinned.end, range_.end), state, False


async def conversions(
    fleet: Fleet, name: str, since: int = 0, limit: int = CONVERSIONS_DEFAULT, wanted: ConversionFilter = ALL
) -> dict[str, object]:
    """Return one page of conversions, looking at no more than ``_SCAN_LIMIT`` records."""
    found: list[dict[str, object]] = []
    position, looked_at, lost, more = since, 0, 0, True
    while more and len(found) < limit and looked_at < _SCAN_LIMIT:
        size = min(limit, _SCAN_PAGE) if wanted.takes_all else _SCAN_PAGE
        records = await fleet.conversions(name, since=position, limit=size)
        more = len(records) == size
        for record in records:
            sequence = cast("int", record["sequence"])
            if len(found) == limit:
                more = True
                break
            lost += sequence - position - 1
            position = sequence
            if wanted.takes(record):
                found.append(record)
        looked_at += size
    return {"conversions": found, "next": position, "more": more, "lost": lost}


async def last_conversions(
    fleet: Fleet, name: str, since: int, count: int, wanted: ConversionFilter
) -> dict[str, object]:
    """Return the last ``count`` conversions above ``since``, looking at no more than ``_SCAN_LIMIT`` records."""
    found: deque[dict[str, object]] = deque()
    last = position = await fleet.last_conversion(name)
    looked_at = 0
    while len(found) < count and position > since and looked_at < _SCAN_LIMIT:
        size = min(position - since, count - len(found) if wanted.takes_all else _SCAN_PAGE)
        records = await fleet.conversions(name, since=position - size, limit=size)
        # The guest goes on: what was asked for may have been forgotten meanwhile, and later ones come instead.
        records = [record for record in records if cast("int", record["sequence"]) <= position]
        for record in reversed(records):
            if wanted.takes(record) and len(found) < count:
                found.appendleft(record)
        looked_at += size
        position -= size
        if len(records) < size:
            position = since  # those before were forgotten
    more = len(found) < count and position > since
    return {"conversions": list(found), "next": max(last, since), "more": more, "lost": 0}
