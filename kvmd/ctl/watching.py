"""Looks at all machines, one after the other: what ``kvmctl top`` shows is made of them."""

from __future__ import annotations

import time
from typing import NamedTuple

from kvmd.ctl.answers import an_object, objects, text
from kvmd.ctl.client import Client, machine_target
from kvmd.ctl.errors import Refused
from kvmd.ctl.figures import Counted, Hot, HotPages, Rates, Row, counted

LOOKED_AT = 512
"""Conversions of a machine that one look reads for its hottest pages: a sample, since there may be 100,000 a second."""

_ASKED_LIMIT = 200
"""Machines that one look asks for their counters."""


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


class _Live(NamedTuple):
    """A machine that may have done something."""

    name: str
    state: str


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

    def look(self) -> Look:
        """Ask all machines; those that run first, then those that do not."""
        machines = [
            _Live(text(machine, "name"), text(machine, "state"))
            for machine in objects(self._client.get("/v1/machines"), "machines")
        ]
        machines = [each for each in machines if not self._names or each.name in self._names]
        self._hot.age()
        rows = []
        asked = 0
        for machine in sorted(machines, key=lambda each: (each.state == "stopped", each.name)):
            found = None
            if machine.state in {"running", "paused"} and asked < _ASKED_LIMIT:
                asked += 1
                found = self._ask(machine.name)
            rows.append(self._rates.row(machine.name, machine.state, time.monotonic(), found))
        names = [row.name for row in rows]
        self._rates.keep(names)
        self._seen = {name: at for name, at in self._seen.items() if name in names}
        return Look(rows, self._hot.hottest())

    def _ask(self, name: str) -> Counted | None:
        """Return a machine's counters, and count its latest conversions; None where it has gone meanwhile."""
        try:
            found = counted(an_object(self._client.get(machine_target(name, "counters"))))
            since = max(found.requests - LOOKED_AT, 0)
            if found.requests < self._seen.get(name, 0):
                self._seen.pop(name)  # another machine of that name
            if found.requests > self._seen.get(name, 0):
                query = [("since", max(since, self._seen.get(name, 0))), ("limit", LOOKED_AT)]
                answer = self._client.get(machine_target(name, "conversions"), query)
                self._hot.add(name, objects(answer, "conversions"))
                self._seen[name] = found.requests
        except Refused:
            return None
        return found
