"""``kvmctl wait``: until a machine is in a state."""

from __future__ import annotations

import click

from kvmd.ctl.acting import explained
from kvmd.ctl.answers import exit_status, how_it_ended
from kvmd.ctl.errors import Refused
from kvmd.ctl.following import Patience
from kvmd.ctl.session import Session, ctl_command, machine_argument
from kvmd.ctl.statuses import Status
from kvmd.ctl.text import shown
from kvmd.ctl.waiting import wait_for


@ctl_command(
    "wait",
    statuses=("1    it was not there in time", "...  with --exit-status, the guest's own, as kvmctl run has it"),
)
@machine_argument()
@click.option(
    "--for",
    "states",
    multiple=True,
    default=("stopped",),
    show_default=True,
    type=click.Choice(["created", "running", "paused", "stopped"]),
    help="The state; repeat it for any of several.",
)
@click.option("-t", "--timeout", type=click.FloatRange(0), metavar="SECONDS", help="At most so long.  [default: ever]")
@click.option("--exit-status", "wants_status", is_flag=True, help="End with the guest's status where it has ended.")
def wait_command(
    session: Session, *, name: str, states: tuple[str, ...], timeout: float | None, wants_status: bool
) -> int:
    """Wait until a machine is in a state, over restarts of kvmd too."""
    client = session.client()
    try:
        machine, reached = wait_for(client, name, states, Patience(session.note), seconds=timeout)
    except Refused as error:
        raise explained(client, error, name, "wait") from error
    session.answer({"reached": reached, "machine": machine}, f"{shown(name)}: {how_it_ended(machine)}")
    if not reached:
        return Status.NOT_YET
    return exit_status(machine) if wants_status and machine.get("state") == "stopped" else Status.DONE
