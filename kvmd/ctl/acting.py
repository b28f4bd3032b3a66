"""Doing something to machines by name: one after the other, each with its own answer."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from kvmd.ctl.answers import objects
from kvmd.ctl.client import Client
from kvmd.ctl.errors import CtlError, Refused
from kvmd.ctl.session import Session
from kvmd.ctl.statuses import Status
from kvmd.ctl.text import shown

_NAMES_SHOWN = 6

_HINTS = {
    ("start", "running"): "it runs already",
    ("start", "paused"): "kvmctl resume lets it go on",
    ("start", "stopped"): "a machine starts once: kvmctl rm it, then create it again",
    ("stop", "created"): "it never ran: kvmctl rm forgets it",
    ("stop", "stopped"): "it has ended already",
    ("kill", "stopped"): "it has ended already",
    ("press", "created"): "kvmctl start runs it",
    ("press", "paused"): "kvmctl resume lets it go on",
    ("press", "stopped"): "it has ended already",
    ("agent", "stopped"): "it has ended already",
    ("balloon", "stopped"): "it has ended already",
    ("pause", "created"): "kvmctl start runs it",
    ("pause", "paused"): "it is paused already",
    ("resume", "created"): "kvmctl start runs it",
    ("resume", "running"): "it runs already",
    ("rm", "running"): "kvmctl stop ends it; rm --force does both",
    ("rm", "paused"): "kvmctl stop ends it; rm --force does both",
}
"""What to do instead, by action and the state that was found."""


def for_each(
    session: Session, names: tuple[str, ...], action: str, act: Callable[[Client, str], tuple[dict[str, Any], bool]]
) -> int:
    """Do something to each machine; a failure of one does not keep the others from it.

    Args:
        session: says how it went.
        names: of the machines; one that is named twice counts once.
        action: its name, for hints.
        act: does it, and returns the machine, and whether it got where it should in time.

    Returns:
        The exit status: of the first failure, else whether all got there.
    """
    client = session.client()
    status = Status.DONE
    for name in dict.fromkeys(names):
        try:
            machine, reached = act(client, name)
        except Refused as error:
            status = status or error.status
            told = explained(client, error, name, action)
            print(json.dumps(told.document()) if session.wants_json else f"kvmctl: error: {told}", file=sys.stderr)
            continue
        session.line(machine, shown(name))
        if not reached:
            status = status or Status.NOT_YET
            session.note(f"{shown(name)} is still {shown(machine.get('state'))}: kvmctl kill ends it at once")
    return status


def explained(client: Client, error: Refused, name: str, action: str) -> Refused:
    """Return a refusal with the machine's name and what to do about it."""
    detail = str(error)
    match error.kind:
        case "unknown-machine":
            detail = f"there is no machine {shown(name)}{did_you_mean(client, name)}"
        case "wrong-state":
            found = error.problem.get("found")
            hint = _HINTS.get((action, found)) if isinstance(found, str) else None
            detail = f"{shown(name)}: {detail}" + (f" ({hint})" if hint else "")
        case _:
            detail = f"{shown(name)}: {detail}"
    told = Refused(error.kind, detail, {**error.problem, "machine": name})
    told.__cause__ = error
    return told


def did_you_mean(client: Client, name: str) -> str:
    """Return the machine that was probably meant, or which there are."""
    import difflib  # noqa: PLC0415 - 3 ms that only a mistake needs

    names: list[str] = []
    with suppress(CtlError):
        names = [str(machine.get("name")) for machine in objects(client.get("/v1/machines"), "machines")]
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f": did you mean {shown(close[0])}?"
    if not names:
        return ": there are none at all (kvmctl create makes one)"
    more = ", ..." if len(names) > _NAMES_SHOWN else ""
    return f": there are {', '.join(map(shown, names[:_NAMES_SHOWN]))}{more}"
