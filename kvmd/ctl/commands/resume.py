"""``kvmctl resume``: paused machines that go on."""

from __future__ import annotations

from kvmd.ctl.acting import for_each
from kvmd.ctl.answers import an_object
from kvmd.ctl.client import machine_target
from kvmd.ctl.session import Session, ctl_command, machine_argument


@ctl_command("resume")
@machine_argument("paused", many=True)
def resume_command(session: Session, *, names: tuple[str, ...]) -> int:
    """Let paused machines go on."""
    return for_each(
        session, names, "resume", lambda client, name: (an_object(client.post(machine_target(name, "resume"))), True)
    )
