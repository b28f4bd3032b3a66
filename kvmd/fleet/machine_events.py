"""The events of one machine, from a place on: from its process while that lives, and then from what it left."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import trio

from kvmd.conversion.record import ConversionRecord
from kvmd.fleet.base import counters_document
from kvmd.fleet.entry import Entry
from kvmd.fleet.looking import conversions_of_ended, counters_of
from kvmd.fleet.places import START, Place
from kvmd.fleet.streams import AGAIN_SECONDS
from kvmd.log import conversion_event, iso_time
from kvmd.machine_process.client import ControlClient, HungUp
from kvmd.machine_process.folder import LastConversions
from kvmd.machine_process.framing import BadMessage
from kvmd.machine_process.lifecycle import LifecycleEvent
from kvmd.machine_process.messages import CounterValues, EventBatch, FollowEvents


class Happened(NamedTuple):
    """One event, and the place after it."""

    place: Place
    kind: str
    data: dict[str, object]


class MachineEvents:
    """One reader of one machine's events, at its own pace.

    Args:
        entry: the machine.
        place: the last one that the reader knows, or None to start with what happens now.
    """

    def __init__(self, entry: Entry, place: Place | None) -> None:
        self._entry = entry
        self._place = place
        self._client: ControlClient | None = None
        self._pending: deque[Happened] = deque()
        self._finished = False
        self.ahead = False
        """Whether the place that it was told lies after all that ever happened: it was never this machine's."""

    @property
    def place(self) -> Place | None:
        """Where it is; None where it was told to start now and could not yet."""
        return self._place

    async def open(self) -> bool:
        """Connect, so that nothing that happens from now on is missed.

        False where the process is about to end, or has no room for one more reader.
        """
        if self._entry.ended or self._entry.deleted:
            self._read_rest()
            return True
        place = self._place
        try:
            self._client = await ControlClient.connect(self._entry.folder)
            step, conversion = (None, None) if place is None else place
            await self._client.send(FollowEvents(step, conversion, counters=True))
            batch = await self._client.receive()  # the first one comes at once
        except (HungUp, BadMessage):
            batch = None
        except BaseException:
            await self.aclose()
            raise
        if isinstance(batch, EventBatch):
            self._take(batch)
            return True
        await self.aclose()
        return False

    async def next(self) -> Happened | None:
        """Return the next event, or None after the machine's last."""
        while not self._pending:
            if self._finished:
                return None
            if self._client is None:
                # It did not answer in time, or its process is at its end.
                if not await self.open():
                    with trio.move_on_after(AGAIN_SECONDS):
                        await self._entry.wait(lambda: self._entry.ended)
                continue
            answer = await self._client.receive()
            if isinstance(answer, EventBatch):
                self._take(answer)
            elif isinstance(answer, CounterValues):
                place = self._place if self._place is not None else START
                self._pending.append(Happened(place, "counters", counters_document(counters_of(answer))))
            else:
                await self.aclose()
        happened = self._pending.popleft()
        self._place = happened.place
        return happened

    async def aclose(self) -> None:
        """Hang up; harmless the second time."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    def _read_rest(self) -> None:
        """Take what happened between the place and the machine's end from what was kept of it."""
        self._finished = True
        steps = self._entry.steps
        last_step = steps[-1].number if steps else 0
        last = conversions_of_ended(self._entry)
        if self._place is None:
            self._place = Place(last_step, 0 if last is None else last.count)
        if last is None:
            last = LastConversions(self._place.conversion, [])
        since = min(self._place.conversion, last.count)
        records = [record for record in last.records if record.sequence > since]
        known = [event for event in steps if event.number > self._place.step]
        lost_steps = known[0].number - self._place.step - 1 if known else 0
        lost = last.count - since - len(records)
        self._take(EventBatch(lost_steps, lost, known, records, max(last_step, self._place.step), last.count))

    def _take(self, batch: EventBatch) -> None:
        start = Place(batch.last_lifecycle - len(batch.lifecycle), batch.last_conversion - len(batch.conversions))
        lost = batch.lost_lifecycle + batch.lost_conversions
        if self._place is None:
            self._place = start
        elif start.step < self._place.step or start.conversion < self._place.conversion:
            self.ahead = True
        elif lost:
            self._pending.append(Happened(start, "lost", {"lost": lost}))
        place = start
        for item in in_order(batch):
            if isinstance(item, LifecycleEvent):
                place = Place(item.number, place.conversion)
                self._pending.append(Happened(place, "lifecycle", lifecycle_event(item)))
            else:
                place = Place(place.step, item.sequence)
                self._pending.append(Happened(place, "conversion", conversion_event(item, self._entry.name)))


def in_order(batch: EventBatch) -> Iterator[LifecycleEvent | ConversionRecord]:
    """Yield both series of a batch as one, by time; each keeps its own order."""
    steps, records = deque(batch.lifecycle), deque(batch.conversions)
    while steps and records:
        yield steps.popleft() if steps[0].wall_ns <= records[0].wall_ns else records.popleft()
    yield from steps
    yield from records


def lifecycle_event(event: LifecycleEvent) -> dict[str, object]:
    """Return a step as ``kvmd.fleet.base.Event`` says."""
    data: dict[str, object] = {"change": event.change, "state": event.state, "time": iso_time(event.wall_ns)}
    if event.change == "stopped":
        data.update(reason=event.reason, message=event.message, status=event.status, signal=event.signal)
    return data
