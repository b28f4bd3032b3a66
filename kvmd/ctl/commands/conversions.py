"""``kvmctl conversions``: a machine's conversions, those kept and those that happen."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import click

from kvmd.ctl.acting import explained
from kvmd.ctl.answers import an_object, number, objects
from kvmd.ctl.client import Client, machine_target
from kvmd.ctl.errors import Refused
from kvmd.ctl.events_text import conversion_line, loss_line
from kvmd.ctl.figures import counted
from kvmd.ctl.following import Followed, Patience, follow
from kvmd.ctl.ranges_option import gpa_range
from kvmd.ctl.session import Session, ctl_command, machine_argument

_PAGE = 1024
_DEFAULT_LAST = 100


class Filters(NamedTuple):
    """Which conversions are shown.

    Attributes:
        exact: members and the value that each must have.
        start, end: guest-physical addresses that a conversion must reach into.
    """

    exact: dict[str, object]
    start: int | None = None
    end: int | None = None

    def let_through(self, record: dict[str, Any]) -> bool:
        """Tell whether a conversion is shown."""
        if any(record.get(key) != value for key, value in self.exact.items()):
            return False
        if self.start is None or self.end is None:
            return True
        try:
            gpa, size = int(str(record["gpa"]), 16), int(record["size"])
        except (KeyError, TypeError, ValueError):
            return False
        return gpa < self.end and self.start < gpa + size


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
    start, end = gpa or (None, None)
    filters = Filters({key: value for key, value in exact.items() if value is not None}, start, end)
    if last is None and since is None:
        last = _DEFAULT_LAST
    try:
        if follows:
            _follow(session, client, name, filters, since or 0, last)
        else:
            _kept(session, client, name, filters, since or 0, last)
    except Refused as error:
        raise explained(client, error, name, "conversions") from error


def _kept(session: Session, client: Client, name: str, filters: Filters, since: int, last: int | None) -> int:
    """Show those that are kept; return the number of the last that was looked at."""
    begin = _near_the_end(client, name, last) if last and not since and filters == Filters({}) else since
    position, shown = _collected(session, client, name, filters, begin, last)
    if begin > since and len(shown) < (last or 0):
        position, shown = _collected(session, client, name, filters, since, last)
    for record in shown:
        _show(session, record)
    return position


def _near_the_end(client: Client, name: str, last: int) -> int:
    """Return where to begin so that the last few come, and not all that are kept, of which there may be 100,000.

    Numbers count a machine's requests, so its counters say about which one is the last.
    """
    return max(0, counted(an_object(client.get(machine_target(name, "counters")))).requests - last)


def _collected(
    session: Session, client: Client, name: str, filters: Filters, since: int, last: int | None
) -> tuple[int, deque[dict[str, Any]]]:
    """Return the number of the last that was looked at, and the last few; without ``last`` show them as they come."""
    position = since
    held: deque[dict[str, Any]] = deque(maxlen=last)
    for record in _pages(client, name, filters, since):
        if "sequence" not in record:
            if last is None:
                _show(session, record)
            continue
        position = max(position, number(record, "sequence"))
        if filters.let_through(record):
            if last is None:
                _show(session, record)
            else:
                held.append(record)
    return position, held


def _pages(client: Client, name: str, filters: Filters, since: int) -> Iterator[dict[str, Any]]:
    """Yield conversions up to now, and where some were forgotten already an object with ``lost``."""
    now = time.time()
    # A guest may convert faster than this reads: it must not go on for ever.
    until = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f"{now % 1:.6f}Z"[1:]
    first = True
    while True:
        query = [("since", since), ("limit", _PAGE), *filters.exact.items()]
        answer = client.get(machine_target(name, "conversions"), query)
        found = objects(answer, "conversions")
        lost = number(answer, "lost")
        # Of all conversions the oldest are always forgotten; only who names one is told.
        if lost and (since or not first):
            yield {"lost": lost}
        yield from found
        following = number(answer, "next")
        if answer.get("more") is not True or following <= since or (found and str(found[-1].get("time")) > until):
            return
        since, first = following, False


def _follow(session: Session, client: Client, name: str, filters: Filters, since: int, last: int | None) -> None:
    """Show those that are kept, then those that happen, none twice and none left out between."""
    position = since

    def show_kept() -> None:
        nonlocal position
        position = _kept(session, client, name, filters, since, last)

    # The stream is open before the others are asked for: between the two nothing happens unseen.
    followed = Followed(name, ("conversion",))
    for event in follow(client, followed, Patience(session.note), opened=show_kept):
        if event.kind == "lost":
            # What the stream lost may be kept all the same; what is not is told with it.
            position = _kept(session, client, name, filters, position, None)
        elif number(event.data, "sequence") > position:
            position = number(event.data, "sequence")
            if filters.let_through(event.data):
                _show(session, event.data)


def _show(session: Session, record: dict[str, Any]) -> None:
    if "sequence" in record:
        session.line({"event": "conversion", **record}, conversion_line(record))
    else:
        session.line({"event": "lost", **record}, loss_line(record))
