"""``kvmctl events``: what happens to machines, as it happens."""

from __future__ import annotations

import click

from kvmd.ctl.acting import explained
from kvmd.ctl.errors import Refused
from kvmd.ctl.events_text import document, line
from kvmd.ctl.following import Followed, Patience, follow
from kvmd.ctl.session import MachineName, Session, ctl_command


@ctl_command("events")
@click.argument("name", metavar="[MACHINE]", required=False, type=MachineName())
@click.option(
    "--kind",
    "kinds",
    multiple=True,
    type=click.Choice(["conversion", "lifecycle", "counters"]),
    help="Only these; repeat it for more.  [default: lifecycle; all with --output json]",
)
@click.option("--since", "last_id", metavar="ID", help="Begin after this event: an id that --output json showed.")
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
        raise error if name is None else explained(client, error, name, "events") from error
