"""Following something that goes on after its connection: streams are taken up again where they were lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from kvmd.ctl.client import Client, Query, machine_target
from kvmd.ctl.errors import CtlError, CutOff, Refused, Unreachable
from kvmd.ctl.sse import Event, Parser

PASSING = frozenset({"stopping", "cut-off", "unreachable", "too-many-connections"})
"""What a daemon that is stopped, started or busy says, or does not say."""

FORGOTTEN = frozenset({"unknown-event", "header-too-large", "invalid-request"})
"""What a daemon says that has no use for the last event's id: of very many machines it does not fit in a header."""

GIVE_UP_SECONDS = 60.0
"""How long kvmd may be away: longer than its restart takes."""

_FIRST_PAUSE_SECONDS = 0.1
_LAST_PAUSE_SECONDS = 2.0


class Patience:
    """How often something is tried again, and for how long.

    Args:
        tell: told once, when the connection is lost, and when it is there again.
        seconds: after so long without a connection, what went wrong is raised.
        pause: waits.
    """

    def __init__(
        self,
        tell: Callable[[str], None],
        *,
        seconds: float = GIVE_UP_SECONDS,
        pause: Callable[[float], None] | None = None,
    ) -> None:
        self._tell = tell
        self._seconds = seconds
        self._pause = pause or time.sleep
        self._since: float | None = None
        self._next = _FIRST_PAUSE_SECONDS

    def lost(self, error: CtlError) -> None:
        """Wait before the next try, or raise ``error`` where it is over."""
        now = time.monotonic()
        if self._since is None:
            self._since = now
            self._tell(f"{error}; trying again")
        elif now - self._since > self._seconds:
            raise error
        self._pause(self._next)
        self._next = min(self._next * 2, _LAST_PAUSE_SECONDS)

    def connected(self) -> None:
        """Note that it is there."""
        if self._since is not None:
            self._tell("kvmd answers again")
        self._since = None
        self._next = _FIRST_PAUSE_SECONDS


class Followed(NamedTuple):
    """What is followed.

    Attributes:
        machine: its name, or None for all.
        kinds: of events; all where it is empty.
        last_id: the event to begin after; None for what happens from now on.
        filters: of conversions, as the API has them.
    """

    machine: str | None
    kinds: tuple[str, ...] = ()
    last_id: str | None = None
    filters: Query = ()

    @property
    def target(self) -> str:
        """The stream's address."""
        return "/v1/events" if self.machine is None else machine_target(self.machine, "events")

    @property
    def query(self) -> Query:
        """The stream's filters."""
        return [*(("kind", kind) for kind in self.kinds), *self.filters]


def follow(
    client: Client, followed: Followed, patience: Patience, *, opened: Callable[[], None] | None = None
) -> Iterator[Event]:
    """Yield events up to the machine's end, or for ever.

    A connection that is lost is made again, and the stream resumed after the last event that came whole. Where the
    daemon no longer knows that event, a ``lost`` of an unknown number is yielded, and the stream goes on from now.

    Args:
        client: asks the daemon.
        followed: what.
        patience: for lost connections.
        opened: called when the first connection is there: whatever happens from then on is seen.
    """
    return _Following(client, followed, patience, opened).events()


class _Following:
    """A stream over any number of connections."""

    def __init__(
        self, client: Client, followed: Followed, patience: Patience, opened: Callable[[], None] | None
    ) -> None:
        self._client = client
        self._followed = followed
        self._patience = patience
        self._opened = opened
        self._parser = Parser(followed.last_id)
        self._seen_any = False

    def events(self) -> Iterator[Event]:
        machine = self._followed.machine
        while True:
            try:
                yield from self._connection()
            except (Refused, CutOff, Unreachable) as error:
                self._bear(error)
                continue
            # It ended as it should: with its machine, or with a daemon that stops.
            if machine is not None and has_ended(self._client, machine, self._patience):
                return
            self._patience.lost(CutOff("kvmd is stopping"))

    def _connection(self) -> Iterator[Event]:
        """Yield the events of one connection."""
        parser = self._parser
        headers = {} if parser.last_id is None else {"Last-Event-ID": parser.last_id}
        parser.restart()
        with self._client.stream(self._followed.target, self._followed.query, headers) as stream:
            self._patience.connected()
            if self._seen_any and parser.last_id is None:
                yield Event("", "lost", {"machine": self._followed.machine, "lost": None})
            self._seen_any = True
            if self._opened is not None:
                self._opened()
                self._opened = None
            while data := stream.read():
                yield from parser.feed(data)

    def _bear(self, error: CtlError) -> None:
        """Wait for the daemon to come back, or raise what nothing is gained by waiting for."""
        if self._seen_any and error.kind in PASSING:
            self._patience.lost(error)
        elif self._seen_any and error.kind in FORGOTTEN and self._parser.last_id is not None:
            # A daemon that has forgotten: the stream goes on from now.
            self._parser = Parser()
        else:
            raise error


def has_ended(client: Client, machine: str, patience: Patience) -> bool:
    """Tell whether a machine has ended, as soon as there is a daemon to ask."""
    while True:
        try:
            found = client.get(machine_target(machine))
        except Refused as error:
            if error.kind == "unknown-machine":
                return True
            if error.kind != "stopping":
                raise
            patience.lost(error)
        except (CutOff, Unreachable) as error:
            patience.lost(error)
        else:
            return isinstance(found, dict) and found.get("state") == "stopped"
