"""``kvmctl kill``: machines ended at once."""

from __future__ import annotations

from kvmd.ctl.acting import for_each
from kvmd.ctl.answers import an_object
from kvmd.ctl.client import machine_target
from kvmd.ctl.session import Session, ctl_command, machine_argument


@ctl_command("kill")
@machine_argument("created", "running", "paused", many=True)
def kill_command(session: Session, *, names: tuple[str, ...]) -> int:
    """End machines at once, whatever state they are in."""
    return for_each(
        session, names, "kill", lambda client, name: (an_object(client.post(machine_target(name, "kill"))), True)
    )
