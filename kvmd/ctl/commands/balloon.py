"""``kvmctl balloon``: memory that a Linux machine does without."""

from __future__ import annotations

import click

from kvmd.ctl.acting import explained
from kvmd.ctl.answers import an_object, number
from kvmd.ctl.client import machine_target
from kvmd.ctl.errors import Mistake, Refused
from kvmd.ctl.session import Session, ctl_command, machine_argument
from kvmd.ctl.text import shown, size
from kvmd.units import parse_size


@ctl_command("balloon")
@machine_argument("created", "running", "paused")
@click.argument("target", metavar="[SIZE]", required=False)
def balloon_command(session: Session, *, name: str, target: str | None) -> None:
    """Show how much memory a Linux machine does without, or ask it to do without SIZE, such as 256M.

    The guest takes its time: what it says that it does without comes closer to what it is asked for. What it has given
    back, and what its memory takes up of the host's, counts pages too that it reported as free by itself.
    """
    client = session.client()
    try:
        if target is None:
            answer = client.get(machine_target(name, "balloon"))
        else:
            answer = client.put(machine_target(name, "balloon"), {"target": _bytes(target)})
    except Refused as error:
        raise explained(client, error, name, "balloon") from error
    balloon = an_object(answer)
    shown_sizes = [size(number(balloon, key)) for key in ("actual", "target", "given_back", "held")]
    actual, wanted, given_back, held = shown_sizes
    line = f"{shown(name)}: does without {actual} of {wanted}; has given back {given_back}; takes up {held}"
    session.answer({"machine": name, **balloon}, line)


def _bytes(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise Mistake(str(error)) from error
