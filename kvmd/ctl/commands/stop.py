"""``kvmctl stop``: machines asked to stop."""

from __future__ import annotations

from typing import Any

import click

from kvmd.ctl.acting import for_each
from kvmd.ctl.answers import an_object
from kvmd.ctl.client import ANSWER_SECONDS, Client, machine_target
from kvmd.ctl.session import Session, ctl_command, machine_argument

WAIT_LIMIT_SECONDS = 3600


@ctl_command("stop", statuses=("1    a machine had not stopped in time",))
@machine_argument("running", "paused", many=True)
@click.option(
    "-t",
    "--timeout",
    type=click.FloatRange(0, WAIT_LIMIT_SECONDS),
    default=30,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for each.",
)
def stop_command(session: Session, *, names: tuple[str, ...], timeout: float) -> int:
    """Ask machines to stop, and wait until they have."""

    def stop(client: Client, name: str) -> tuple[dict[str, Any], bool]:
        query = (("timeout", f"{timeout:g}"),)
        answer = client.post(machine_target(name, "stop"), query=query, seconds=timeout + ANSWER_SECONDS)
        return an_object(answer, "machine"), answer.get("reached") is True

    return for_each(session, names, "stop", stop)
