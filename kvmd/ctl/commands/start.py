"""``kvmctl start``: machines that were created, running."""

from __future__ import annotations

from kvmd.ctl.acting import for_each
from kvmd.ctl.answers import an_object
from kvmd.ctl.client import machine_target
from kvmd.ctl.session import Session, ctl_command, machine_argument


@ctl_command("start")
@machine_argument("created", many=True)
def start_command(session: Session, *, names: tuple[str, ...]) -> int:
    """Run machines that were created."""
    return for_each(
        session, names, "start", lambda client, name: (an_object(client.post(machine_target(name, "start"))), True)
    )
