"""``kvmctl top``: conversions, memory and latencies of all machines, as they change."""

from __future__ import annotations

import itertools
import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

import click

from kvmd.ctl.errors import CutOff, Refused, Unreachable
from kvmd.ctl.following import Patience
from kvmd.ctl.session import MachineName, Session, ctl_command
from kvmd.ctl.statuses import Status
from kvmd.ctl.terminal import keys
from kvmd.ctl.top_view import as_screen, as_text
from kvmd.ctl.watching import Look, Watcher

_QUIT = b"qQ\x03\x04"


@ctl_command("top")
@click.argument("names", metavar="[MACHINE...]", nargs=-1, type=MachineName("running", "paused"))
@click.option(
    "-i", "--interval", type=click.FloatRange(0.05, 3600), default=1.0, show_default=True, metavar="SECONDS",
    help="Between two looks.",
)  # fmt: skip
@click.option("-n", "--count", type=click.IntRange(1), metavar="N", help="End after N looks.  [default: never]")
def top_command(session: Session, *, names: tuple[str, ...], interval: float, count: int | None) -> int:
    """Watch all machines, or some: conversions a second, memory, latencies, and the pages that convert most.

    On a terminal it is drawn over until q or Ctrl-C; elsewhere, and with --output json, each look is lines of its own.
    """
    watcher = Watcher(session.client(), names)
    with ExitStack() as stack:
        if sys.stdout.isatty() and not session.wants_json:
            view: _Screen | _Printed = stack.enter_context(_screen())
        else:
            view = _Printed(session)
        quit_asked = stack.enter_context(_quit_asked())
        patience = Patience(view.say, pause=lambda seconds: None if not quit_asked(seconds) else _quit())
        with suppress(_Quit, KeyboardInterrupt):
            _watch(watcher, view, patience, quit_asked, interval, count)
    return Status.DONE


def _watch(
    watcher: Watcher,
    view: _Screen | _Printed,
    patience: Patience,
    quit_asked: Callable[[float], bool],
    interval: float,
    count: int | None,
) -> None:
    # The first look has no rates: it is only shown where somebody waits for the next.
    answered = False
    for number in itertools.count():
        begun = time.monotonic()
        try:
            look = watcher.look()
        except (CutOff, Unreachable, Refused) as error:
            if not answered or (isinstance(error, Refused) and error.kind != "stopping"):
                raise
            patience.lost(error)
            continue
        answered = True
        patience.connected()
        if number or isinstance(view, _Screen):
            view.show(look)
        if count is not None and number >= count:
            return
        if quit_asked(max(0.0, interval - (time.monotonic() - begun))):
            return


class _Printed:
    """Each look as lines."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.say = session.note

    def show(self, look: Look) -> None:
        self._session.line(look.document(), as_text(look) + "\n")


class _Screen:
    """Each look in place of the one before."""

    def __init__(self, update: Callable[[Look, str], None]) -> None:
        self._update = update
        self._last: Look | None = None
        self._message = ""

    def say(self, message: str) -> None:
        """Show a message until the next look."""
        self._message = message
        self._update(self._last or Look([], []), message)

    def show(self, look: Look) -> None:
        self._last = look
        self._update(look, "")


@contextmanager
def _screen() -> Iterator[_Screen]:
    from rich.console import Console  # noqa: PLC0415 - 60 ms that no other command needs
    from rich.live import Live  # noqa: PLC0415 - likewise

    console = Console()
    with Live(console=console, auto_refresh=False, screen=True) as live:
        yield _Screen(lambda look, message: live.update(as_screen(look, message), refresh=True))


@contextmanager
def _quit_asked() -> Iterator[Callable[[float], bool]]:
    """Yield what waits for some seconds, or a key, and tells whether that was q."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        yield _sleep
        return
    fd = sys.stdin.fileno()

    def wait(seconds: float) -> bool:
        ready, _, _ = select.select([fd], [], [], seconds)
        if not ready:
            return False
        typed = os.read(fd, 64)
        return not typed or any(key in _QUIT for key in typed)

    with keys(fd):
        yield wait


def _sleep(seconds: float) -> bool:
    time.sleep(seconds)
    return False


class _Quit(Exception):
    """The operator has seen enough."""


def _quit() -> None:
    raise _Quit
