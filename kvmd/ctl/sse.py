"""Server-sent events (HTML, 9.2): bytes in, events out, no I/O."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import NamedTuple

from kvmd.ctl.errors import NotKvmd

LINE_LIMIT = 1 << 20
"""Characters of an event: no event of kvmd's comes near."""

_RETRY_LIMIT_MS = 60_000


class Event(NamedTuple):
    """One event.

    Attributes:
        id: where it is in the stream.
        kind: ``conversion``, ``lifecycle``, ``counters`` or ``lost``.
        data: what it says.
    """

    id: str
    kind: str
    data: dict[str, object]


class Parser:
    """Makes events of a stream's bytes.

    Attributes:
        last_id: of the last event that was complete, or None.
        retry_seconds: how long the server wants its readers to wait before they come back, or None.
    """

    def __init__(self, last_id: str | None = None) -> None:
        self.last_id = last_id
        self.retry_seconds: float | None = None
        self._begin()

    def _begin(self) -> None:
        """Forget what was half an event: its connection is gone."""
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")(errors="replace")
        self._line = ""
        self._after_return = False
        self._next_id = self.last_id
        self._kind = ""
        self._data: list[str] = []
        self._size = 0

    def restart(self) -> None:
        """Begin with a new connection's bytes."""
        self._begin()

    def feed(self, data: bytes) -> Iterator[Event]:
        """Yield the events that these bytes complete.

        Raises:
            NotKvmd: they are none of kvmd's.
        """
        text = self._decoder.decode(data)
        # A line ends with CR, LF or both: one that ended with CR at the end of what came before may go on with LF.
        if self._after_return and text:
            text = text.removeprefix("\n")
            self._after_return = False
        if text:
            self._after_return = text.endswith("\r")
        *lines, self._line = (self._line + text).replace("\r\n", "\n").replace("\r", "\n").split("\n")
        for line in lines:
            event = self._take(line)
            if event is not None:
                yield event
        self._bound(len(self._line))

    def _take(self, line: str) -> Event | None:
        if not line:
            return self._dispatch()
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        match field:
            case "data":
                self._size += len(value)
                self._bound(0)
                self._data.append(value)
            case "event":
                self._kind = value
            case "id" if "\0" not in value:
                self._next_id = value
            case "retry" if value.isascii() and value.isdigit():
                self.retry_seconds = min(int(value[:9]), _RETRY_LIMIT_MS) / 1000
            case _:
                pass  # a comment, or a field of a later version
        return None

    def _dispatch(self) -> Event | None:
        self.last_id = self._next_id
        kind, data = self._kind, self._data
        self._kind, self._data, self._size = "", [], 0
        if not data:
            return None
        try:
            document = json.loads("\n".join(data))
        except (ValueError, RecursionError) as error:
            raise NotKvmd("the stream has an event that is no JSON") from error
        if not isinstance(document, dict):
            raise NotKvmd("the stream has an event that is no JSON object")
        return Event(self.last_id or "", kind or "message", document)

    def _bound(self, more: int) -> None:
        if self._size + more > LINE_LIMIT:
            raise NotKvmd("the stream has an event that is larger than any of kvmd's")
