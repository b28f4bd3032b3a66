"""Looks at all machines, again and again: what ``kvmctl top`` shows is made of them."""

from __future__ import annotations

import time

from kvmd.ctl.answers import an_object, objects, text
from kvmd.ctl.client import Client
from kvmd.ctl.figures import Hot, HotPages, Rates, Row, counted


class Look:
    """What there is to see at one moment."""

    def __init__(self, rows: list[Row], hottest: list[Hot]) -> None:
        self.rows = rows
        self.hottest = hottest

    def document(self) -> dict[str, object]:
        """Return it for programs."""
        return {
            "machines": [row.document() for row in self.rows],
            "hottest": [hot.document() for hot in self.hottest],
        }


class Watcher:
    """Looks at machines again and again.

    Args:
        client: asks the daemon.
        names: only these; all where it is empty.
    """

    def __init__(self, client: Client, names: tuple[str, ...]) -> None:
        self._client = client
        self._names = frozenset(names)
        self._rates = Rates()
        self._hot = HotPages()

    def look(self) -> Look:
        """Ask for all machines; those that run come first, then those that do not."""
        machines = [
            machine
            for machine in objects(self._client.get("/v1/counters"), "machines")
            if not self._names or text(machine, "name") in self._names
        ]
        now = time.monotonic()
        self._hot.begin()
        rows = []
        for machine in sorted(machines, key=lambda each: (text(each, "state") == "stopped", text(each, "name"))):
            name, state = text(machine, "name"), text(machine, "state")
            found = None
            if state in {"running", "paused"} and machine.get("counters") is not None:
                counters = an_object(machine, "counters")
                found = counted(counters)
                self._hot.add(name, now, counters)
            rows.append(self._rates.row(name, state, now, found))
        self._rates.keep([row.name for row in rows])
        return Look(rows, self._hot.hottest())
