"""The counters of all machines at once."""

from __future__ import annotations

from collections.abc import Iterable

import trio

from kvmd.errors import KvmdError
from kvmd.fleet.base import Counters, Fleet, MachineInfo, counters_document

ASK_SECONDS = 1.0
"""A machine that does not say its counters within this is left out."""


async def counters_of_all(fleet: Fleet, machines: Iterable[MachineInfo]) -> dict[str, Counters]:
    """Return the counters of every machine that says them in time; all are asked at once."""
    answers: dict[str, Counters] = {}

    async def ask(name: str) -> None:
        try:
            answers[name] = await fleet.counters(name)
        except KvmdError:
            return  # it went away meanwhile: the figures are of those that are there

    with trio.move_on_after(ASK_SECONDS):
        async with trio.open_nursery() as nursery:
            for info in machines:
                nursery.start_soon(ask, info.name)
    return answers


async def all_counters(fleet: Fleet) -> dict[str, object]:
    """Return what all machines did so far, by name, as the API's answer has it."""
    machines = fleet.machines()
    found = await counters_of_all(fleet, machines)
    return {
        "machines": [
            {
                "name": info.name,
                "state": info.state,
                "counters": counters_document(found[info.name]) if info.name in found else None,
            }
            for info in machines
        ]
    }
