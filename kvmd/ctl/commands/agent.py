"""``kvmctl agent``: the program in a Linux machine that has its port."""

from __future__ import annotations

import sys

import click

from kvmd.ctl.acting import explained
from kvmd.ctl.client import machine_target
from kvmd.ctl.console_link import ConsoleLink, Ended
from kvmd.ctl.errors import CutOff, Refused
from kvmd.ctl.screen import Screen
from kvmd.ctl.session import Session, ctl_command, machine_argument
from kvmd.ctl.statuses import Status
from kvmd.ctl.text import shown

PROTOCOL = "kvmd-agent"


@ctl_command("agent", statuses=("1    the agent said nothing",))
@machine_argument("created", "running", "paused")
@click.option(
    "-t",
    "--timeout",
    type=click.FloatRange(0, 3600),
    default=1,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for an answer, or more of it, after the end of the input.",
)
def agent_command(session: Session, *, name: str, timeout: float) -> int:
    """Talk to the agent in a Linux machine: standard input goes to its port, and what it says comes back.

    One at a time does. What is sent waits until a program in the guest has opened the port. For QEMU's guest agent:

      echo '{"execute":"guest-ping"}' | kvmctl agent MACHINE

    What the agent says is not escaped.
    """
    client = session.client()
    screen = Screen(session, name)
    said = False

    def show(data: bytes) -> None:
        nonlocal said
        said = True
        screen.show(data)

    try:
        with client.upgrade(machine_target(name, "agent"), PROTOCOL) as connection:
            link = ConsoleLink(connection, sys.stdin.fileno(), is_terminal=False, show=show, quiet_seconds=timeout)
            ended = link.run()
        screen.end()
    except Refused as error:
        raise explained(client, error, name, "agent") from error
    if ended is Ended.OTHER_SIDE:
        raise CutOff(f"the connection to the agent of {shown(name)} was closed: the machine has ended, or kvmd stops")
    if not said:
        session.note(f"the agent of {shown(name)} said nothing")
        return Status.NOT_YET
    return Status.DONE
