"""How ``kvmctl top`` looks: lines for a file or a pipe, a screen for a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from kvmd.ctl.figures import Hot, Row
from kvmd.ctl.text import columns, cut, shown
from kvmd.ctl.watching import Look
from kvmd.units import format_size

if TYPE_CHECKING:
    from rich.console import RenderableType

_HEADING = (
    "MACHINE",
    "STATE",
    "TO SHARED/s",
    "TO PRIVATE/s",
    "OTHER/s",
    "SHARED",
    "PRIVATE",
    "WAIT",
    "APPLY",
    "DISCARD",
)
_RIGHT = frozenset(range(2, len(_HEADING)))
_HOT_HEADING = ("HOTTEST", "GPA", "SIZE", "CONVERSIONS/s", "SINCE ITS START")
_HOT_RIGHT = frozenset({2, 3, 4})
_TOTAL = "all"
_SHOWN_FROM = 0.005
"""A share of a vCPU that is not shown as 0 %."""
_CAPTION = (
    "latencies in microseconds, median / 99 %; OTHER changed nothing; held back: of a vCPU's time, by conversion.rate"
)


def as_text(look: Look) -> str:
    """Return a look as lines."""
    parts = [columns(_HEADING, _cells(look), right=_RIGHT)]
    if look.hottest:
        parts.append(columns(_HOT_HEADING, map(_hot, look.hottest), right=_HOT_RIGHT))
    return "\n\n".join(parts)


def as_screen(look: Look, message: str) -> RenderableType:
    """Return a look as a table for rich.

    Args:
        look: what is shown.
        message: shown above; nothing where it is empty.
    """
    from rich import box  # noqa: PLC0415 - 60 ms that no other command needs
    from rich.console import Group  # noqa: PLC0415 - likewise
    from rich.table import Table  # noqa: PLC0415 - likewise
    from rich.text import Text  # noqa: PLC0415 - likewise

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for at, heading in enumerate(_HEADING):
        table.add_column(heading, justify="right" if at in _RIGHT else "left", no_wrap=True)
    for cells in _cells(look):
        style = "dim" if cells[1] == "stopped" else "bold" if cells[0] == _TOTAL and not cells[1] else ""
        # Text, and not markup: a name may have brackets.
        table.add_row(*(Text(cut(shown(cell))) for cell in cells), style=style)
    hottest = Table(box=None, pad_edge=False, show_edge=False, header_style="bold")
    for at, heading in enumerate(_HOT_HEADING):
        hottest.add_column(heading, justify="right" if at in _HOT_RIGHT else "left", no_wrap=True)
    for hot in look.hottest:
        hottest.add_row(*(Text(cut(shown(cell))) for cell in _hot(hot)))
    head = Text(
        message or "kvmctl top: q ends it", style="red" if message else "dim", no_wrap=True, overflow="ellipsis"
    )
    parts: list[RenderableType] = [head, Text(), table, Text(_CAPTION, style="dim"), Text()]
    return Group(*parts, hottest) if look.hottest else Group(*parts)


def _cells(look: Look) -> Iterable[tuple[str, ...]]:
    for row in look.rows:
        yield _row(row)
    told = [(row, row.counted) for row in look.rows if row.counted is not None]
    if len(told) > 1:
        rates = (
            sum(row.to_shared for row, _ in told),
            sum(row.to_private for row, _ in told),
            sum(row.other for row, _ in told),
        )
        sizes = (sum(found.shared_bytes for _, found in told), sum(found.private_bytes for _, found in told))
        yield (_TOTAL, "", *map(_rate, rates), *map(format_size, sizes), "", "", "")


def _row(row: Row) -> tuple[str, ...]:
    found = row.counted
    if found is None:
        return (row.name, row.state, *("-" for _ in _RIGHT))
    latencies = (f"{p50:,.0f} / {p99:,.0f}" for p50, p99 in found.latencies)
    rates = map(_rate, (row.to_shared, row.to_private, row.other))
    sizes = map(format_size, (found.shared_bytes, found.private_bytes))
    return (row.name, _state(row), *rates, *sizes, *latencies)


def _state(row: Row) -> str:
    """Return the state, and how much of a vCPU's time the machine is slowed down by its rate."""
    return f"{row.state}, held back {row.held_back:.0%}" if row.held_back >= _SHOWN_FROM else row.state


def _hot(hot: Hot) -> tuple[str, ...]:
    return (hot.machine, hot.gpa, format_size(hot.size_bytes), _rate(hot.per_second), f"{hot.times:,}")


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 or not value else f"{value:.1f}"  # noqa: PLR2004 - two digits tell enough
