"""How a demo shows that it goes on: lines where nobody sees a terminal, a live display where somebody does."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from kvmd.cli.summary import GuestResult, colored_picture, is_unicode, palette_for
from kvmd.conversion.messages import Outcome
from kvmd.picture import picture
from kvmd.ranges import GpaRange
from kvmd.runnable import Runnable

PROGRESS_SECONDS = 0.125
"""How often a display is told of the progress."""

PLAIN_SECONDS = 2.0
"""How often the plain one has a line for it."""

_PICTURE_ROWS = 4


class Display(Protocol):
    """What a demo tells of each guest, in this order."""

    def __enter__(self) -> Self:
        """Begin."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the terminal back as it was."""

    def begin(self, name: str, description: str) -> None:
        """A guest starts."""

    def progress(self, machine: Runnable, seconds: float) -> None:
        """It has run for ``seconds``; called every ``PROGRESS_SECONDS``."""

    def note(self, line: str) -> None:
        """It printed a line, or the log said something."""

    def end(self, result: GuestResult) -> None:
        """It has ended."""


class PlainDisplay:
    """Lines, for a file, a pipe or CI: one each few seconds, and what the guest prints."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._next_line = PLAIN_SECONDS

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def begin(self, name: str, description: str) -> None:
        """Name the guest."""
        self._next_line = PLAIN_SECONDS
        self._line(f"{name}: {description}")

    def progress(self, machine: Runnable, seconds: float) -> None:
        """Say how far it is, every ``PLAIN_SECONDS``."""
        if seconds >= self._next_line:
            self._next_line += PLAIN_SECONDS
            self._line(f"  {seconds:.0f} s: {_so_far(machine)}")

    def note(self, line: str) -> None:
        """Repeat the line."""
        self._line(f"  | {line}")

    def end(self, result: GuestResult) -> None:
        """Say how it ended."""
        self._line(f"  {_ended(result)}")
        self._line("")

    def _line(self, text: str) -> None:
        # Not through rich's wrapping: a line stays a line for whoever reads the file.
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class LiveDisplay:
    """A display that is drawn over, with the map of memory as it changes; lines that are over scroll up above it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._unicode = is_unicode(console)
        # No thread of its own: the event loop draws.
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.update(Text(""), refresh=True)
        self._live.stop()

    def begin(self, name: str, description: str) -> None:
        """Name the guest."""
        self._console.print(Text.assemble((name, "bold"), f": {description}"))

    def progress(self, machine: Runnable, seconds: float) -> None:
        """Draw counters and memory."""
        self._live.update(self._drawn(machine, seconds), refresh=True)

    def note(self, line: str) -> None:
        """Repeat the line, above the display."""
        self._console.print(Text(f"  {'│' if self._unicode else '|'} {line}"))

    def end(self, result: GuestResult) -> None:
        """Say how it ended, in place of the display."""
        self._live.update(Text(""), refresh=True)
        mark = ("✓" if result.passed else "✗") if self._unicode else ("ok" if result.passed else "FAILED")
        style = "green" if result.passed else "red"
        self._console.print(Text.assemble("  ", (mark, style), f" {_ended(result)}"))

    def _drawn(self, machine: Runnable, seconds: float) -> RenderableType:
        palette = palette_for(unicode=self._unicode)
        whole = GpaRange(0, machine.spec.memory)
        drawn = picture(machine.memory_map(), whole, pinned=machine.pinned, rows=_PICTURE_ROWS, palette=palette)
        return Group(Text(f"  {seconds:.1f} s: {_so_far(machine)}"), colored_picture(drawn, palette))


def _so_far(machine: Runnable) -> str:
    snapshot = machine.stats.snapshot()
    others = ", ".join(
        f"{count:,} {outcome.value}"
        for outcome in Outcome
        if outcome is not Outcome.CONVERTED and (count := snapshot.requests(outcome=outcome))
    )
    return (
        f"{snapshot.conversions:,} conversions, {snapshot.conversions_per_second:,.0f} a second"
        f"{', ' if others else ''}{others}"
    )


def _ended(result: GuestResult) -> str:
    conversions = f"{result.stats.conversions:,} conversions in {result.seconds:.2f} s"
    if result.passed:
        return f"passed: {conversions}"
    return f"ended with status {result.stop.status} ({result.stop.reason.value}: {result.stop.message}): {conversions}"
