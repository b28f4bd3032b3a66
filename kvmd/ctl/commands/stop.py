"""``kvmctl stop``: machines that shut down, or are stopped."""

from __future__ import annotations

from typing import Any

import click

from kvmd.ctl.acting import for_each
from kvmd.ctl.answers import an_object
from kvmd.ctl.client import ANSWER_SECONDS, Client, machine_target
from kvmd.ctl.errors import Refused
from kvmd.ctl.following import Patience
from kvmd.ctl.session import Session, ctl_command, machine_argument
from kvmd.ctl.text import shown
from kvmd.ctl.waiting import wait_for

WAIT_LIMIT_SECONDS = 3600
SHUTDOWN_SECONDS = 30
"""How long a Linux guest has to shut down, unless something else is asked for."""

_STOP_SECONDS = 30.0


@ctl_command("stop", statuses=("1    a machine had not stopped in time",))
@machine_argument("running", "paused", many=True)
@click.option(
    "-t",
    "--timeout",
    type=click.FloatRange(0, WAIT_LIMIT_SECONDS),
    default=SHUTDOWN_SECONDS,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for each.",
)
@click.option("--now", is_flag=True, help="Do not ask a Linux guest first: what it has not written is lost.")
def stop_command(session: Session, *, names: tuple[str, ...], timeout: float, now: bool) -> int:
    """Shut machines down, or stop them, and wait until they have.

    A Linux guest's power button is pressed; one that has not shut down in time is stopped all the same. A payload, and
    a machine that is paused, is stopped at once.
    """

    def stop(client: Client, name: str) -> tuple[dict[str, Any], bool]:
        if now or not _pressed(client, name):
            return _stopped(client, name, timeout)
        machine, reached = wait_for(client, name, ("stopped",), Patience(session.note), seconds=timeout)
        if reached:
            return machine, True
        session.note(f"{shown(name)} did not shut down within {timeout:g} s, and is stopped")
        return _stopped(client, name, _STOP_SECONDS)

    return for_each(session, names, "stop", stop)


def _pressed(client: Client, name: str) -> bool:
    """Press the power button; return False where there is none, or nobody who would see it."""
    try:
        client.post(machine_target(name, "power-button"))
    except Refused as error:
        if error.kind not in {"no-such-device", "wrong-state", "not-found"}:
            raise
        return False
    return True


def _stopped(client: Client, name: str, timeout: float) -> tuple[dict[str, Any], bool]:
    query = (("timeout", f"{timeout:g}"),)
    answer = client.post(machine_target(name, "stop"), query=query, seconds=timeout + ANSWER_SECONDS)
    return an_object(answer, "machine"), answer.get("reached") is True
