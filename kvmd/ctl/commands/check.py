"""``kvmctl check``: whether kvmd answers, and what its host can do."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import click

from kvmd.ctl.answers import an_object
from kvmd.ctl.client import Client
from kvmd.ctl.errors import Unreachable
from kvmd.ctl.session import Session, ctl_command
from kvmd.ctl.statuses import Status
from kvmd.ctl.text import shown

_AGAIN_SECONDS = 0.05


@ctl_command("check")
@click.option(
    "--wait",
    "seconds",
    type=click.FloatRange(0),
    default=0.0,
    metavar="SECONDS",
    help="Give a kvmd that is starting so long to answer.",
)
def check_command(session: Session, *, seconds: float) -> int:
    """Say whether kvmd answers, and what its host can do; 121 where it cannot run guests.

    'kvmd check' asks the host itself.
    """
    answer = _asked(session.client(), seconds)
    host = an_object(answer, "host")
    usable = host.get("usable") is True
    session.answer(answer, "\n".join(_lines(answer, host, usable=usable)))
    return Status.DONE if usable else Status.UNREACHABLE


def _asked(client: Client, seconds: float) -> dict[str, Any]:
    """Return what the daemon says of itself and its host, once there is one to ask."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return an_object(client.get("/v1/host"))
        except Unreachable:
            if time.monotonic() >= deadline:
                raise
            time.sleep(_AGAIN_SECONDS)


def _lines(answer: dict[str, Any], host: dict[str, Any], *, usable: bool) -> Iterator[str]:
    can = "can" if usable else "cannot"
    yield f"kvmd {shown(answer.get('version', '?'))} answers, and {can} run guests on this host."
    if host.get("problem"):
        yield f"  because        {shown(host['problem'])}"
    yield ""
    yield f"  memory faults  layout {shown(host.get('fault_layout') or '-')}"
    tripwires = host.get("tripwires")
    yield f"  tripwires      {', '.join(map(shown, tripwires)) if isinstance(tripwires, list) and tripwires else '-'}"
    yield from _protections(host)
    most, recommended = (shown(host.get(key, "?")) for key in ("max_vcpus", "recommended_vcpus"))
    yield f"  vCPUs          up to {most}, {recommended} recommended"
    yield f"  memslots       {shown(host.get('memslots', '?'))}"
    missing = [entry for entry in _entries(host) if not entry.get("value")]
    if missing:
        yield ""
        yield "What KVM lacks, and what that costs:"
    for entry in missing:
        yield f"  {shown(entry.get('name'))}" + ("   (kvmd needs it)" if entry.get("required") else "")
        yield f"    without  {shown(entry.get('without'))}"


def _protections(host: dict[str, Any]) -> Iterator[str]:
    protections = host.get("protections")
    found = protections.items() if isinstance(protections, dict) else ()
    working = [shown(name) for name, each in found if isinstance(each, dict) and each.get("usable") is True]
    strongest = f"   (auto takes {shown(host['auto'])})" if host.get("auto") else ""
    yield f"  protection     {', '.join(working) or 'none works here'}{strongest}"
    for name, each in found:
        if isinstance(each, dict) and each.get("problem"):
            yield f"  {'':14} {shown(name)}: {shown(each['problem'])}"


def _entries(host: dict[str, Any]) -> list[dict[str, Any]]:
    capabilities = host.get("capabilities")
    return [entry for entry in capabilities if isinstance(entry, dict)] if isinstance(capabilities, list) else []
