"""What the bytes of the API's streams are: server-sent events (HTML, 9.2), or output as it is."""

from __future__ import annotations

import msgspec
import trio

from kvmd.api.filters import ConversionFilter
from kvmd.errors import UnknownMachine
from kvmd.fleet.base import Event, EventStream, Fleet, OutputPart

EVENT_STREAM = "text/event-stream"

_RETRY = b"retry: 1000\n\n"
_STILL_HERE = b": still here\n\n"
_MOVE_ON_SECONDS = 1.0


class EventEncoder:
    """Events as server-sent ones. What a filter leaves out still moves the reader's place on, once a second.

    Args:
        stream: of the events: its place goes with the greeting.
        kinds: of events that are shown.
        conversions: which conversions are.
    """

    def __init__(self, stream: EventStream, kinds: frozenset[str], conversions: ConversionFilter) -> None:
        self._kinds = kinds
        self._conversions = conversions
        self._takes_all = conversions.takes_all
        self._sent = ""
        self._seen = stream.place or ""
        self._move_on_at = 0.0

    def greeting(self) -> bytes:
        """Return the place, and how soon to come back."""
        return self._place() + _RETRY

    def encode(self, event: Event) -> bytes:
        """Return an event; of one that is not shown, now and then its place."""
        self._seen = event.id
        if event.kind in self._kinds and (
            self._takes_all or event.kind != "conversion" or self._conversions.takes(event.data)
        ):
            self._sent = event.id
            return sse(event)
        now = trio.current_time()
        if now < self._move_on_at:
            return b""
        self._move_on_at = now + _MOVE_ON_SECONDS
        return self._place() + b"\n"

    def keep_alive(self) -> bytes:
        """Return a comment, and the place where it has moved."""
        return self._place() + _STILL_HERE

    def farewell(self) -> bytes:
        """Return nothing: a machine's last event says that it is the last."""
        return b""

    def _place(self) -> bytes:
        """Return an id without an event: it moves the reader's place, and nothing else (HTML, 9.2.6)."""
        if self._sent == self._seen:
            return b""
        self._sent = self._seen
        return b"id: %b\n" % self._seen.encode()


class RawOutput:
    """Output as it is: bytes, and nothing that could say more."""

    def greeting(self) -> bytes:
        """Return nothing."""
        return b""

    def encode(self, part: OutputPart) -> bytes:
        """Return the bytes."""
        return part.data

    keep_alive = farewell = greeting


class OutputEvents:
    """Output as server-sent events: ``output`` with the place after it as id, and at its own end ``end``.

    Args:
        fleet: knows how the machine ended.
        name: the machine's.
        start: where the reader begins.
    """

    def __init__(self, fleet: Fleet, name: str, start: int) -> None:
        self._fleet = fleet
        self._name = name
        self._place = start

    def greeting(self) -> bytes:
        """Return how soon to come back."""
        return _RETRY

    def encode(self, part: OutputPart) -> bytes:
        """Return some output."""
        self._place = part.end
        data = {"machine": self._name, "from": part.start, "dropped": part.dropped, "data": part.data}
        return b"id: %d\nevent: output\ndata: %b\n\n" % (part.end, msgspec.json.encode(data))

    def keep_alive(self) -> bytes:
        """Return a comment."""
        return _STILL_HERE

    def farewell(self) -> bytes:
        """Return why there is no more: the machine has ended, or no more was asked for."""
        data: dict[str, object] = {"machine": self._name, "ended": True}
        try:
            end = self._fleet.machine(self._name).end
        except UnknownMachine:
            end = None  # it was deleted, and had ended before
        else:
            data["ended"] = end is not None
        if end is not None:
            data.update(reason=end.reason, message=end.message, status=end.status, signal=end.signal)
        return b"id: %d\nevent: end\ndata: %b\n\n" % (self._place, msgspec.json.encode(data))


def sse(event: Event) -> bytes:
    """Return an event as text/event-stream has it (HTML, 9.2.5); JSON has no line breaks of its own."""
    data = msgspec.json.encode({"machine": event.machine, **event.data}, enc_hook=str)
    return b"id: %b\nevent: %b\ndata: %b\n\n" % (event.id.encode(), event.kind.encode(), data)
