"""``kvmctl console``: a machine's console, both ways."""

from __future__ import annotations

import sys
from typing import Any

import click

from kvmd.ctl.acting import explained
from kvmd.ctl.answers import an_object, how_it_ended
from kvmd.ctl.client import Client, machine_target
from kvmd.ctl.console_link import ConsoleLink, Ended
from kvmd.ctl.errors import CutOff, Refused, Unreachable
from kvmd.ctl.screen import Screen
from kvmd.ctl.session import Session, ctl_command, machine_argument
from kvmd.ctl.terminal import as_before, detach_key, raw
from kvmd.ctl.text import shown

PROTOCOL = "kvmd-console"


@ctl_command("console")
@machine_argument("created", "running", "paused")
@click.option(
    "--detach-key",
    "detach",
    default="ctrl-]",
    show_default=True,
    metavar="KEY",
    callback=detach_key,
    help="What ends the connection; the machine goes on.",
)
def console_command(session: Session, *, name: str, detach: bytes) -> None:
    """Type into a machine's console, and see what it prints.

    On a terminal every key goes to the guest, Ctrl-C too, but the one that detaches. Elsewhere standard input is the
    guest's, and at its end what the guest prints is shown on until it ends. What the guest prints is not escaped: it
    is a terminal's other end.
    """
    client = session.client()
    screen = Screen(session, name)
    is_terminal = sys.stdin.isatty()
    try:
        with client.upgrade(machine_target(name, "console"), PROTOCOL) as connection:
            link = ConsoleLink(connection, sys.stdin.fileno(), is_terminal=is_terminal, show=screen.show, detach=detach)
            if is_terminal:
                key = f"Ctrl-{chr(detach[0] | 0x40)}"
                session.note(f"the console of {shown(name)}: {key} ends the connection, and not the machine")
                try:
                    with raw(sys.stdin.fileno()):
                        ended = link.run()
                finally:
                    if sys.stdout.isatty():
                        as_before(sys.stdout.fileno())
                    print(file=sys.stderr)
            else:
                ended = link.run()
        screen.end()
    except Refused as error:
        told = explained(client, error, name, "console")
        if error.kind == "forbidden":
            told = Refused(told.kind, f"{told} (kvmctl logs --console -f only looks)", told.problem)
        raise told from error
    if ended is Ended.DETACHED:
        session.note(f"detached from {shown(name)}")
        return
    machine = _machine_after(client, name)
    if machine.get("state") != "stopped":
        raise CutOff(f"kvmd closed the console of {shown(name)}: it stops, or restarts, and the machine goes on")
    session.note(f"{shown(name)} has ended: {how_it_ended(machine)}")


def _machine_after(client: Client, name: str) -> dict[str, Any]:
    """Return the machine whose console was closed; nothing of it where there is no daemon to ask."""
    try:
        return an_object(client.get(machine_target(name)))
    except (CutOff, Unreachable):
        return {}
    except Refused as error:
        if error.kind != "stopping":
            raise
        return {}
