"""What a demo ends with: conversions, latencies, hottest pages and the map of memory, for a person to read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from kvmd.conversion.messages import Cause, Outcome
from kvmd.conversion.stats import StatsSnapshot
from kvmd.picture import ASCII, BLOCKS, Palette, picture
from kvmd.ranges import GpaRange, PageState
from kvmd.stop import Stop, StopReason
from kvmd.units import PAGE_SIZE, format_size

HOTTEST_SHOWN = 5
_PICTURE_ROWS = 4
_ZOOM = 16
"""How many times smaller than memory its busy part must be to be drawn again, larger."""


@dataclass(frozen=True, slots=True)
class GuestResult:
    """One guest that has ended.

    Attributes:
        name: the guest's.
        stop: why it ended.
        seconds: how long it ran.
        stats: its conversions.
        memory_map: its memory, in order, when most of it was shared, as far as was seen.
        mapped_at: when that was, in seconds from its start.
        memory_bytes: size of its memory.
        pinned: memory that never converts.
    """

    name: str
    stop: Stop
    seconds: float
    stats: StatsSnapshot
    memory_map: tuple[tuple[GpaRange, PageState], ...]
    mapped_at: float
    memory_bytes: int
    pinned: GpaRange

    @property
    def passed(self) -> bool:
        """Whether the guest ended by itself and found everything as it should be."""
        return self.stop.reason is StopReason.GUEST_EXIT and self.stop.status == 0


def summary(results: Sequence[GuestResult], *, unicode: bool) -> RenderableType:
    """Return the summary of guests that have ended."""
    converting = [result for result in results if result.stats.conversions]
    # Titles of their own: a table's title is wrapped to the table's width.
    parts: list[RenderableType] = [Group(_title("Conversions"), _outcomes(results, unicode=unicode))]
    if converting:
        micro = "µs" if unicode else "us"
        latency = _title(f"Latency in {micro}, from a vCPU's exit to its answer")
        parts.append(Group(latency, _latencies(converting, unicode=unicode)))
        hottest = _title("Hottest pages, and how often each was converted")
        parts.append(Group(hottest, _hottest(converting, unicode=unicode)))
    parts += [_memory(result, unicode=unicode) for result in converting]
    return Group(*(item for part in parts for item in (part, Text())))


def colored_picture(drawn: str, palette: Palette) -> Text:
    """Return a picture with its cells coloured; the text stays the same."""
    text = Text(drawn, no_wrap=True)
    for character, style in (
        (palette.private, "green"),
        (palette.shared, "yellow"),
        (palette.mixed, "cyan"),
        (palette.pinned, "blue"),
    ):
        for at, found in enumerate(drawn):
            if found == character:
                text.stylize(style, at, at + 1)
    return text


def palette_for(*, unicode: bool) -> Palette:
    """Return the characters that a terminal can show."""
    return BLOCKS if unicode else ASCII


def is_unicode(console: Console) -> bool:
    """Tell whether ``console`` can show block characters."""
    return console.encoding.lower().startswith("utf")


def _title(text: str) -> Text:
    return Text(text, style="bold")


def _table(*, unicode: bool) -> Table:
    style = box.SIMPLE_HEAD if unicode else box.ASCII2
    return Table(box=style, pad_edge=False, show_edge=False)


def _outcomes(results: Sequence[GuestResult], *, unicode: bool) -> Table:
    """Conversions by cause and direction, and how the other requests ended: guests across, kinds down."""
    table = _table(unicode=unicode)
    table.add_column("")
    for result in results:
        table.add_column(result.name, justify="right")
    arrow = "→" if unicode else "->"
    for cause in Cause:
        for to in (PageState.SHARED, PageState.PRIVATE):
            counts = [r.stats.requests(cause=cause, to=to, outcome=Outcome.CONVERTED) for r in results]
            table.add_row(f"{cause.value} {to.opposite.value} {arrow} {to.value}", *map(_count, counts))
    table.add_section()
    for outcome in Outcome:
        if outcome is Outcome.CONVERTED:
            continue
        counts = [result.stats.requests(outcome=outcome) for result in results]
        if any(counts):
            table.add_row(f"{outcome.value} (nothing changed)", *map(_count, counts))
    table.add_row("pages converted", *(_count(r.stats.pages_to_private + r.stats.pages_to_shared) for r in results))
    table.add_row("conversions a second", *(_count(round(r.stats.conversions_per_second)) for r in results))
    table.add_row("seconds", *(f"{result.seconds:.2f}" for result in results))
    return table


def _latencies(results: Sequence[GuestResult], *, unicode: bool) -> Table:
    table = _table(unicode=unicode)
    for heading in ("", "part"):
        table.add_column(heading)
    for heading in ("median", "90 %", "99 %", "longest"):
        table.add_column(heading, justify="right")
    for result in results:
        stats = result.stats
        parts = (
            ("waiting", stats.waiting),
            ("applying", stats.applying),
            ("discarding", stats.discarding),
            ("total", stats.total),
        )
        for row, (part, latency) in enumerate(parts):
            values = (latency.p50, latency.p90, latency.p99, latency.maximum)
            table.add_row("" if row else result.name, part, *(f"{value:,.0f}" for value in values))
        table.add_section()
    return table


def _hottest(results: Sequence[GuestResult], *, unicode: bool) -> Table:
    table = _table(unicode=unicode)
    for result in results:
        table.add_column(result.name)
    for rank in range(HOTTEST_SHOWN):
        cells = []
        for result in results:
            if rank >= len(result.stats.hottest):
                cells.append("")
                continue
            hot = result.stats.hottest[rank]
            size = "" if hot.size_bytes == PAGE_SIZE else f" ({format_size(hot.size_bytes)})"
            cells.append(f"{hot.gpa:#x}{size} {hot.count:,}")
        if any(cells):
            table.add_row(*cells)
    return table


def _memory(result: GuestResult, *, unicode: bool) -> RenderableType:
    """All of memory, and under it the part that was busy, where that is small in it."""
    palette = palette_for(unicode=unicode)
    whole = GpaRange(0, result.memory_bytes)

    def drawn(within: GpaRange, rows: int, *, legend: bool) -> Text:
        text = picture(result.memory_map, within, pinned=result.pinned, rows=rows, palette=palette, legend=legend)
        return colored_picture(text, palette)

    if any(state is PageState.SHARED for _, state in result.memory_map):
        when = f"after {result.mapped_at:.2f} s, when most of it was shared"
    else:
        when = "with nothing shared, as it was whenever looked at"
    title = _title(f"Memory of {result.name} {when}")
    busy = _busy(result)
    parts = [title, drawn(whole, _PICTURE_ROWS, legend=True)]
    if busy.size_bytes * _ZOOM <= result.memory_bytes:
        parts += [Text("and the part that it converts most"), drawn(busy, _PICTURE_ROWS // 2, legend=False)]
    return Group(*parts)


def _busy(result: GuestResult) -> GpaRange:
    """Return the range from the first to the last of the hottest pages and those shared now."""
    ranges = [GpaRange.of_size(hot.gpa, hot.size_bytes) for hot in result.stats.hottest]
    ranges += [range_ for range_, state in result.memory_map if state is PageState.SHARED]
    return GpaRange(min(range_.start for range_ in ranges), max(range_.end for range_ in ranges))


def _count(number: int) -> str:
    return f"{number:,}" if number else "-"
