"""``kvmctl events``: what happens to machines, as it happens."""

from __future__ import annotations

import click

from kvmd.ctl.acting import explained
from kvmd.ctl.errors import Refused
from kvmd.ctl.events_text import document, line
from kvmd.ctl.following import FORGOTTEN, Followed, Patience, follow
from kvmd.ctl.session import MachineName, Session, ctl_command

_SHOWN_CHARACTERS = 80


def _event_id(ctx: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """Return an id of an event, which is what a field of HTTP's can hold: no other one was ever shown."""
    if value is not None and not (value.isascii() and value.isprintable()):
        raise click.BadParameter(f"{value[:_SHOWN_CHARACTERS]!r} is no id of an event", ctx, parameter)
    return value


@ctl_command("events")
@click.argument("name", metavar="[MACHINE]", required=False, type=MachineName())
@click.option(
    "--kind",
    "kinds",
    multiple=True,
    type=click.Choice(["conversion", "lifecycle", "counters"]),
    help="Only these; repeat it for more.  [default: lifecycle; all with --output json]",
)
@click.option(
    "--since",
    "last_id",
    metavar="ID",
    callback=_event_id,
    help="Begin after this event: an id that --output json showed.",
)
def events_command(session: Session, *, name: str | None, kinds: tuple[str, ...], last_id: str | None) -> None:
    """Show what happens to all machines, or to one until it has ended.

    The stream is taken up where it was when kvmd restarts; what was lost all the same is shown.
    """
    client = session.client(watch_output=True)
    if not kinds and not session.wants_json:
        kinds = ("lifecycle",)
    followed = Followed(name, kinds, last_id)
    try:
        for event in follow(client, followed, Patience(session.note)):
            session.line(document(event), line(event))
    except Refused as error:
        if last_id is not None and error.kind in FORGOTTEN:
            raise _never_an_id(error, name, last_id) from error
        raise error if name is None else explained(client, error, name, "events") from error


def _never_an_id(error: Refused, name: str | None, last_id: str) -> Refused:
    """Return the refusal of an id in the words of this command: the daemon's speak of a field of HTTP's."""
    whose = "all machines' events" if name is None else f"{name}'s events"
    detail = (
        f"--since: {last_id[:_SHOWN_CHARACTERS]!r} was never an id of {whose}: leave it out, or give one that "
        "--output json showed of them"
    )
    return Refused(error.kind, detail, error.problem if name is None else {**error.problem, "machine": name})
