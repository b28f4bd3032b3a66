"""Looks at all machines, one after the other: what ``kvmctl top`` shows is made of them."""

from __future__ import annotations

import time

from kvmd.ctl.answers import an_object, objects, text
from kvmd.ctl.client import Client, machine_target
from kvmd.ctl.errors import Refused
from kvmd.ctl.figures import Hot, HotPages, Rates, Row, counted

LOOKED_AT = 512
"""Conversions of a machine that one look reads for its hottest pages: a sample, since there may be 100,000 a second."""

_ASKED_LIMIT = 200
"""Machines that one look asks for their conversions."""


class Look:
    """What there is to see at one moment."""

    def __init__(self, rows: list[Row], hottest: list[Hot]) -> None:
        self.rows = rows
        self.hottest = hottest

    def document(self) -> dict[str, object]:
        """Return it for programs."""
        return {
            "machines": [row.document() for row in self.rows],
            "hottest": [
                {"machine": hot.machine, "gpa": hot.gpa, "size": hot.size_bytes, "count": round(hot.times, 1)}
                for hot in self.hottest
            ],
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
        self._seen: dict[str, int] = {}
        self._asked = 0

    def look(self) -> Look:
        """Ask for all machines; those that run come first, then those that do not."""
        self._asked = 0
        machines = [
            machine
            for machine in objects(self._client.get("/v1/counters"), "machines")
            if not self._names or text(machine, "name") in self._names
        ]
        now = time.monotonic()
        self._hot.age()
        rows = []
        for machine in sorted(machines, key=lambda each: (text(each, "state") == "stopped", text(each, "name"))):
            name, state = text(machine, "name"), text(machine, "state")
            found = None
            if state in {"running", "paused"} and machine.get("counters") is not None:
                found = counted(an_object(machine, "counters"))
                self._look_at_pages(name, found.requests)
            rows.append(self._rates.row(name, state, now, found))
        names = [row.name for row in rows]
        self._rates.keep(names)
        self._seen = {name: at for name, at in self._seen.items() if name in names}
        return Look(rows, self._hot.hottest())

    def _look_at_pages(self, name: str, requests: int) -> None:
        """Count a machine's latest conversions by range, where there were any since the last look."""
        if requests < self._seen.get(name, 0):
            self._seen.pop(name)  # another machine of that name
        if requests <= self._seen.get(name, 0) or self._asked >= _ASKED_LIMIT:
            return
        self._asked += 1
        query = [("since", self._seen.get(name, 0)), ("last", LOOKED_AT)]
        try:
            self._hot.add(name, objects(self._client.get(machine_target(name, "conversions"), query), "conversions"))
        except Refused:
            return  # it has gone meanwhile
        self._seen[name] = requests
