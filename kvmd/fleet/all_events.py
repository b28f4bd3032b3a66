"""The events of all machines as one stream: a task for each machine, and one place for the reader."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager

import trio

from kvmd.fleet.base import Event, EventStream
from kvmd.fleet.entry import Entry
from kvmd.fleet.machine_events import MachineEvents
from kvmd.fleet.places import START, Place, Places
from kvmd.fleet.streams import PlacedStream

_IN_FLIGHT = 64
"""Events that wait for a slow reader here; all others wait where they happen."""

_OPEN_SECONDS = 2.0
"""How long a machine that does not answer holds up the beginning of a stream."""


class Newcomers:
    """Tells those who follow all machines of new ones."""

    def __init__(self) -> None:
        self._listeners: list[Callable[[Entry], None]] = []

    def tell(self, entry: Entry) -> None:
        """Say that a machine is there."""
        for listener in list(self._listeners):
            listener(entry)

    def add(self, listener: Callable[[Entry], None]) -> None:
        """Tell ``listener`` from now on. It must neither block nor raise."""
        self._listeners.append(listener)

    def remove(self, listener: Callable[[Entry], None]) -> None:
        """Tell it no more."""
        self._listeners.remove(listener)


class AllEvents:
    """One reader of all events.

    Args:
        entries: the machines that are there.
        places: where the reader was, by each machine's creation; None to start with what happens now.
    """

    def __init__(self, entries: Iterable[Entry], places: dict[int, Place] | None) -> None:
        self._entries = list(entries)
        self._known = places
        self._places = Places()
        self._send, self._receive = trio.open_memory_channel[tuple[Entry, Place | None, str, dict[str, object]]](
            _IN_FLIGHT
        )

    @asynccontextmanager
    async def follow(self, newcomers: Newcomers) -> AsyncIterator[EventStream]:
        """Follow all machines, and those that come."""
        async with trio.open_nursery() as nursery:

            def came(entry: Entry) -> None:
                self._places.set(entry.info.created_ns, START)
                nursery.start_soon(self._follow_one, MachineEvents(entry, START), entry)

            newcomers.add(came)
            try:
                async with trio.open_nursery() as opening:
                    for entry in self._entries:
                        if self._known is None:
                            place = None
                        else:
                            place = self._known.get(entry.info.created_ns, START)
                            self._places.set(entry.info.created_ns, place)
                        opening.start_soon(self._open_one, MachineEvents(entry, place), entry, nursery)
                yield PlacedStream(self._next, lambda: str(self._places))
            finally:
                newcomers.remove(came)
                nursery.cancel_scope.cancel()

    async def _open_one(self, events: MachineEvents, entry: Entry, nursery: trio.Nursery) -> None:
        with trio.move_on_after(_OPEN_SECONDS):
            await events.open()
        if events.place is not None:
            self._places.set(entry.info.created_ns, events.place)
        nursery.start_soon(self._follow_one, events, entry)

    async def _follow_one(self, events: MachineEvents, entry: Entry) -> None:
        try:
            while (happened := await events.next()) is not None:
                await self._send.send((entry, *happened))
            # Not before: a reader that is slow would hear of a machine again that it was told is deleted.
            await entry.wait(lambda: entry.deleted)
            await self._send.send((entry, None, "lifecycle", {"change": "deleted"}))
        finally:
            await events.aclose()

    async def _next(self) -> Event:
        entry, place, kind, data = await self._receive.receive()
        if place is None:
            self._places.forget(entry.info.created_ns)
        else:
            self._places.set(entry.info.created_ns, place)
        return Event(id=str(self._places), kind=kind, machine=entry.name, data=data)
