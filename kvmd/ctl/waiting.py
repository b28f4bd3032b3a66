"""Waiting for a machine's state, however long, and over a restart of the daemon."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from kvmd.ctl.answers import an_object
from kvmd.ctl.client import ANSWER_SECONDS, Client, machine_target
from kvmd.ctl.errors import CutOff, Refused, Unreachable
from kvmd.ctl.following import Patience

_SLICE_SECONDS = 300.0
"""How long one request waits."""


def wait_for(
    client: Client, name: str, states: Sequence[str], patience: Patience, *, seconds: float | None = None
) -> tuple[dict[str, Any], bool]:
    """Return a machine, and whether it is in one of the states: otherwise the time was over first.

    Raises:
        CtlError: there is no such machine, or no daemon for too long.
    """
    deadline = None if seconds is None else time.monotonic() + seconds
    asked = False
    while True:
        left = _SLICE_SECONDS if deadline is None else max(0.0, min(_SLICE_SECONDS, deadline - time.monotonic()))
        query = [*(("state", state) for state in states), ("timeout", f"{left:.3f}")]
        try:
            answer = client.get(machine_target(name, "wait"), query, seconds=left + ANSWER_SECONDS)
        except (Refused, CutOff, Unreachable) as error:
            # A daemon that nobody listens for from the beginning is not one that restarts.
            if not (error.kind in {"cut-off", "stopping"} or (asked and error.kind == "unreachable")):
                raise
            asked = True
            patience.lost(error)
            continue
        asked = True
        patience.connected()
        machine = an_object(answer, "machine")
        if answer.get("reached") is True:
            return machine, True
        if deadline is not None and time.monotonic() >= deadline:
            return machine, False
