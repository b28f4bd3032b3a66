"""Places in streams of events: what an event's id says, so that a reader comes back to exactly there.

A machine's events are two numbered series, its steps and its conversions; a place is the last number of each that was
seen. That of the stream of all machines is one place a machine, by when the machine was created. Nothing needs to be
remembered for a reader, and a daemon that is started anew understands the ids of the one before.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

_PLACE = re.compile(r"([0-9]{1,18})-([0-9]{1,18})", re.ASCII)
_ALL = "all"
_MACHINES_LIMIT = 65536


class Place(NamedTuple):
    """The last numbers that were seen of one machine: see ``kvmd.machine_process.messages.FollowEvents``."""

    step: int
    conversion: int

    def __str__(self) -> str:
        return f"{self.step}-{self.conversion}"


START = Place(0, 0)


def parse_place(text: str) -> Place:
    """Return the place that an id of one machine's stream names.

    Raises:
        ValueError: it was never one.
    """
    found = _PLACE.fullmatch(text)
    if found is None:
        raise never_an_id(text, "a machine's")
    return Place(int(found[1]), int(found[2]))


def format_places(places: Mapping[int, Place]) -> str:
    """Return the id of a place in the stream of all machines.

    Args:
        places: by the nanosecond of each machine's creation.
    """
    return "~".join([_ALL, *(f"{created_ns:x}.{place}" for created_ns, place in places.items())])


def parse_places(text: str) -> dict[int, Place]:
    """Return the places that an id of the stream of all machines names.

    Raises:
        ValueError: it was never one.
    """
    first, *parts = text.split("~")
    try:
        if first != _ALL or len(parts) > _MACHINES_LIMIT:
            raise ValueError(text)  # noqa: TRY301 - like all that is wrong with it
        places = {}
        for part in parts:
            created, _, place = part.partition(".")
            places[int(created, 16)] = parse_place(place)
    except ValueError as error:
        raise never_an_id(text, "the daemon's") from error
    return places


def never_an_id(text: str, whose: str) -> ValueError:
    """Return the error for an id that a stream of events never had."""
    return ValueError(f"{text[:80]!r} was never an id of {whose} events")
