"""``kvmctl logs``: what a machine's process logged, or what its guest printed."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator

import click

from kvmd.ctl.acting import explained
from kvmd.ctl.client import machine_target
from kvmd.ctl.errors import Refused
from kvmd.ctl.following import Patience
from kvmd.ctl.output_stream import Lines, follow_output, kept_output
from kvmd.ctl.session import Session, ctl_command, machine_argument
from kvmd.ctl.text import clock, shown

_FIRST_KEYS = ("timestamp", "level", "event", "machine")


@ctl_command("logs")
@machine_argument()
@click.option("-f", "--follow", "follows", is_flag=True, help="Go on with what comes, to the machine's end.")
@click.option("--console", "wants_console", is_flag=True, help="What the guest printed, and not the log.")
@click.option("-n", "--last", type=click.IntRange(0), metavar="N", help="Only the last N lines of what is kept.")
def logs_command(session: Session, *, name: str, follows: bool, wants_console: bool, last: int | None) -> None:
    """Show what a machine's process logged, from as far back as kvmd keeps it.

    Text is escaped: what a guest printed does nothing to a terminal here ('kvmctl console' shows it as it is).
    """
    client = session.client(watch_output=True)
    target = machine_target(name, *(("console", "output") if wants_console else ("log",)))
    tail = _Tail(last, lambda line: (_show_console if wants_console else _show_log)(session, name, line))
    try:
        if follows:
            pieces: Iterator[bytes] = follow_output(
                client,
                target,
                Patience(session.note),
                kept=None if last is None else tail.let_go,
                dropped=lambda count: session.note(f"{count:,} bytes are not kept any more"),
            )
        else:
            pieces = kept_output(client, target)
        lines = Lines()
        for piece in pieces:
            for line in lines.feed(piece):
                tail.add(line)
        if rest := lines.rest():
            tail.add(rest)
        tail.let_go()
    except Refused as error:
        raise explained(client, error, name, "logs") from error


class _Tail:
    """Holds the last lines back until it is known which those are.

    Args:
        size: how many; all are let through where it is None.
        show: shows one.
    """

    def __init__(self, size: int | None, show: Callable[[bytes], None]) -> None:
        self._held: deque[bytes] | None = None if size is None else deque(maxlen=size)
        self._show = show

    def add(self, line: bytes) -> None:
        if self._held is None:
            self._show(line)
        else:
            self._held.append(line)

    def let_go(self) -> None:
        """Show those held, and all that come from now on."""
        held, self._held = self._held, None
        for line in held or ():
            self._show(line)


def _show_console(session: Session, name: str, line: bytes) -> None:
    text = line.decode(errors="replace").removesuffix("\r")
    session.line({"machine": name, "text": text}, shown(text))


def _show_log(session: Session, name: str, line: bytes) -> None:
    if not line.strip():
        return
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        entry = None
    if not isinstance(entry, dict):
        text = line.decode(errors="replace")
        session.line({"machine": name, "text": text}, shown(text))
        return
    more = " ".join(f"{shown(key)}={shown(value)}" for key, value in entry.items() if key not in _FIRST_KEYS)
    words = [clock(entry.get("timestamp", "-")), f"{shown(entry.get('level', '-')):7}", shown(entry.get("event", "-"))]
    session.line(entry, "  ".join([*words, more]).rstrip())
