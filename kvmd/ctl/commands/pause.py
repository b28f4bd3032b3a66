"""``kvmctl pause``: machines whose vCPUs stay out of the guest."""

from __future__ import annotations

from kvmd.ctl.acting import for_each
from kvmd.ctl.answers import an_object
from kvmd.ctl.client import machine_target
from kvmd.ctl.session import Session, ctl_command, machine_argument


@ctl_command("pause")
@machine_argument("running", many=True)
def pause_command(session: Session, *, names: tuple[str, ...]) -> int:
    """Take machines' vCPUs out of the guest; their memory stays as it is."""
    return for_each(
        session, names, "pause", lambda client, name: (an_object(client.post(machine_target(name, "pause"))), True)
    )
