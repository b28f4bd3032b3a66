"""Places in streams of events: what an event's id says, so that a reader comes back to exactly there.

A machine's events are two numbered series, its steps and its conversions; a place is the last number of each that was
seen. That of the stream of all machines is one place a machine, by when the machine was created. Nothing needs to be
remembered for a reader, and a daemon that is started anew understands the ids of the one before.
"""

from __future__ import annotations

import re
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


class Places:
    """A place in the stream of all machines; its text is the id.

    Each machine's part is kept as text: an event changes one of them, and a hundred machines may be followed.
    """

    def __init__(self) -> None:
        self._texts: dict[int, str] = {}

    def set(self, created_ns: int, place: Place) -> None:
        """Note the place in the events of a machine, by the nanosecond of its creation."""
        self._texts[created_ns] = f"{created_ns:x}.{place}"

    def forget(self, created_ns: int) -> None:
        """Forget a machine; harmless where it is not known."""
        self._texts.pop(created_ns, None)

    def __str__(self) -> str:
        return "~".join([_ALL, *self._texts.values()])


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
