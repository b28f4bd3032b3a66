"""``kvmctl press``: Linux machines' power buttons."""

from __future__ import annotations

from kvmd.ctl.acting import for_each
from kvmd.ctl.answers import an_object
from kvmd.ctl.client import machine_target
from kvmd.ctl.session import Session, ctl_command, machine_argument


@ctl_command("press")
@machine_argument("running", many=True)
def press_command(session: Session, *, names: tuple[str, ...]) -> int:
    """Press Linux machines' power buttons, and do not wait for what they do about it.

    Most shut down; kvmctl stop waits for that.
    """
    return for_each(
        session,
        names,
        "press",
        lambda client, name: (an_object(client.post(machine_target(name, "power-button"))), True),
    )
