"""What a machine prints or logs: bytes that begin as far back as kvmd keeps them, and end with the machine."""

from __future__ import annotations

import binascii
from collections.abc import Callable, Iterator

from kvmd.ctl.client import Client
from kvmd.ctl.errors import CtlError, CutOff, NotKvmd, Refused, Unreachable
from kvmd.ctl.following import PASSING, Patience
from kvmd.ctl.sse import Event, Parser

LINE_LIMIT = 1 << 20

_EVENTS = {"Accept": "text/event-stream"}


def kept_output(client: Client, target: str) -> Iterator[bytes]:
    """Yield what is kept, and not what comes later."""
    with client.stream(target, [("follow", "false")]) as stream:
        while data := stream.read():
            yield data


def follow_output(
    client: Client,
    target: str,
    patience: Patience,
    *,
    kept: Callable[[], None] | None = None,
    dropped: Callable[[int], None] | None = None,
) -> Iterator[bytes]:
    """Yield what is kept and what comes, up to the machine's end.

    A connection that is lost is made again, and the output goes on where it was.

    Args:
        client: asks the daemon.
        target: the stream.
        patience: for lost connections.
        kept: called when what is kept has come.
        dropped: told how many bytes are missing before those that come next: kvmd did not keep them.
    """
    following = _Following(client, target, patience, dropped or (lambda _: None))
    if kept is not None:
        yield from following.output(follow=False)
        kept()
    yield from following.output(follow=True)


class _Following:
    """One output over any number of connections."""

    def __init__(self, client: Client, target: str, patience: Patience, dropped: Callable[[int], None]) -> None:
        self._client = client
        self._target = target
        self._patience = patience
        self._dropped = dropped
        self._parser = Parser()
        self._connected = False

    def output(self, *, follow: bool) -> Iterator[bytes]:
        """Yield what comes, to the machine's end or to that of what there is now."""
        while True:
            try:
                for event in self._events(follow=follow):
                    if event.kind == "output":
                        yield self._data(event)
                    elif event.kind == "end" and (event.data.get("ended") is True or not follow):
                        return
            except (Refused, CutOff, Unreachable) as error:
                self._bear(error)
                continue
            self._patience.lost(CutOff("kvmd is stopping"))

    def _events(self, *, follow: bool) -> Iterator[Event]:
        parser = self._parser
        headers = _EVENTS if parser.last_id is None else {**_EVENTS, "Last-Event-ID": parser.last_id}
        parser.restart()
        query = [("follow", "true" if follow else "false")]
        with self._client.stream(self._target, query, headers) as stream:
            self._patience.connected()
            self._connected = True
            while data := stream.read():
                yield from parser.feed(data)

    def _data(self, event: Event) -> bytes:
        data, dropped = event.data.get("data"), event.data.get("dropped")
        if isinstance(dropped, int) and dropped > 0:
            self._dropped(dropped)
        try:
            return binascii.a2b_base64(data if isinstance(data, str) else "-", strict_mode=True)
        except ValueError as error:
            raise NotKvmd("the stream has output that is no base64") from error

    def _bear(self, error: CtlError) -> None:
        """Wait for the daemon to come back, or raise what nothing is gained by waiting for."""
        if not self._connected or error.kind not in PASSING:
            raise error
        self._patience.lost(error)


class Lines:
    """Makes lines of bytes that come in any pieces; the last may be without an end."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the lines that these bytes complete; one that is too long comes in pieces."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        yield from lines
        if len(self._rest) > LINE_LIMIT:
            yield self.rest()

    def rest(self) -> bytes:
        """Return what is there of the last line."""
        rest, self._rest = self._rest, b""
        return rest
