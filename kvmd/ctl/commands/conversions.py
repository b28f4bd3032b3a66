"""``kvmctl conversions``: a machine's conversions, those kept and those that happen."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import click

from kvmd.ctl.acting import explained
from kvmd.ctl.answers import number, objects
from kvmd.ctl.client import Client, Query, machine_target
from kvmd.ctl.errors import Refused
from kvmd.ctl.events_text import conversion_line, loss_line
from kvmd.ctl.following import Followed, Patience, follow
from kvmd.ctl.ranges_option import gpa_range
from kvmd.ctl.session import Session, ctl_command, machine_argument

_PAGE = 1024
_DEFAULT_LAST = 100
_LAST_LIMIT = 4096
_SIZE_LIMIT = (1 << 63) - 1
"""The API's own limits."""


@ctl_command("conversions")
@machine_argument()
@click.option("-f", "--follow", "follows", is_flag=True, help="Go on with those that happen, to the machine's end.")
@click.option(
    "-n",
    "--last",
    type=click.IntRange(0),
    metavar="N",
    help=f"Only the last N that are kept.  [default: {_DEFAULT_LAST}, or all with --since]",
)
@click.option("--since", type=click.IntRange(0), metavar="SEQUENCE", help="Only those with a number above this one.")
@click.option("--cause", type=click.Choice(["implicit", "explicit"]))
@click.option("--to", type=click.Choice(["private", "shared"]))
@click.option("--outcome", type=click.Choice(["converted", "spurious", "stale", "refused", "failed"]))
@click.option("--vcpu", type=click.IntRange(0))
@click.option("--gpa", callback=gpa_range, metavar="RANGE", help="Only those that reach into it, such as 0x200000+64K.")
def conversions_command(
    session: Session,
    *,
    name: str,
    follows: bool,
    last: int | None,
    since: int | None,
    gpa: tuple[int, int] | None,
    **exact: object,
) -> None:
    """Show a machine's conversions: the recent ones that kvmd keeps, oldest first, and with -f all that happen."""
    client = session.client(watch_output=True)
    filters: Query = [(key, value) for key, value in exact.items() if value is not None]
    if gpa is not None:
        filters = [*filters, ("gpa", hex(gpa[0])), ("size", min(gpa[1] - gpa[0], _SIZE_LIMIT))]
    if last is None and since is None:
        last = _DEFAULT_LAST
    try:
        if follows:
            _follow(session, client, name, filters, since or 0, last)
        else:
            _kept(session, client, name, filters, since or 0, last)
    except Refused as error:
        raise explained(client, error, name, "conversions") from error


def _kept(session: Session, client: Client, name: str, filters: Query, since: int, last: int | None) -> int:
    """Show those that are kept; return the number of the last that was looked at."""
    if last is not None and 0 < last <= _LAST_LIMIT:
        answer = client.get(machine_target(name, "conversions"), [("since", since), ("last", last), *filters])
        found = objects(answer, "conversions")
        # Where the filters leave out nearly everything, kvmd gives up looking back: then all are looked at.
        if answer.get("more") is not True:
            for record in found:
                _show(session, record)
            return number(answer, "next")
    position, held = since, deque[dict[str, Any]](maxlen=last)
    for record in _pages(client, name, filters, since):
        if "next" in record:
            position = number(record, "next")
        elif last is None:
            _show(session, record)
        elif "sequence" in record:
            held.append(record)
    for record in held:
        _show(session, record)
    return position


def _pages(client: Client, name: str, filters: Query, since: int) -> Iterator[dict[str, Any]]:
    """Yield conversions up to now.

    Where some were forgotten already an object with ``lost`` comes in their place, and after each page one with
    ``next``: the number of the last that was looked at.
    """
    now = time.time()
    # A guest may convert faster than this reads: it must not go on for ever.
    until = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f"{now % 1:.6f}Z"[1:]
    first = True
    while True:
        query = [("since", since), ("limit", _PAGE), *filters]
        answer = client.get(machine_target(name, "conversions"), query)
        found = objects(answer, "conversions")
        lost = number(answer, "lost")
        # Of all conversions the oldest are always forgotten; only who names one is told.
        if lost and (since or not first):
            yield {"lost": lost}
        yield from found
        following = number(answer, "next")
        yield {"next": following}
        if answer.get("more") is not True or following <= since or (found and str(found[-1].get("time")) > until):
            return
        since, first = following, False


def _follow(session: Session, client: Client, name: str, filters: Query, since: int, last: int | None) -> None:
    """Show those that are kept, then those that happen, none twice and none left out between."""
    position = since

    def show_kept() -> None:
        nonlocal position
        position = _kept(session, client, name, filters, since, last)

    # The stream is open before the others are asked for: between the two nothing happens unseen.
    followed = Followed(name, ("conversion",), filters=filters)
    for event in follow(client, followed, Patience(session.note), opened=show_kept):
        if event.kind == "lost":
            # What the stream lost may be kept all the same; what is not is told with it.
            position = _kept(session, client, name, filters, position, None)
        elif number(event.data, "sequence") > position:
            position = number(event.data, "sequence")
            _show(session, event.data)


def _show(session: Session, record: dict[str, Any]) -> None:
    if "sequence" in record:
        session.line({"event": "conversion", **record}, conversion_line(record))
    else:
        session.line({"event": "lost", **record}, loss_line(record))
