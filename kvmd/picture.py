"""Guest memory as a picture for the terminal: which of it is private, and which is shared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvmd.ranges import GpaRange, PageState
from kvmd.units import PAGE_SIZE, format_size

COLUMNS = 64
ROWS = 8


@dataclass(frozen=True, slots=True)
class Palette:
    """One character for each kind of cell."""

    private: str
    shared: str
    mixed: str
    pinned: str


BLOCKS = Palette(private="█", shared="░", mixed="▒", pinned="▓")
ASCII = Palette(private="#", shared=".", mixed="+", pinned="@")


def picture(
    memory_map: Sequence[tuple[GpaRange, PageState]],
    within: GpaRange,
    *,
    pinned: GpaRange | None = None,
    columns: int = COLUMNS,
    rows: int = ROWS,
    palette: Palette = BLOCKS,
    legend: bool = True,
) -> str:
    """Return lines of cells, each of the same power of two of pages, and a legend.

    A cell is mixed where it holds pages of both states; one that is all of one state and holds pinned pages too
    shows as pinned.

    Args:
        memory_map: ranges without overlap; memory that none covers is left blank.
        within: what to draw; all of memory starts at gpa 0.
        pinned: memory that never converts, or None.
        columns: cells in a row.
        rows: rows, at most.
        palette: the characters.
        legend: whether the last line says what they mean, and not only how large a cell is.

    Raises:
        ValueError: there is no cell to draw in.
    """
    if columns < 1 or rows < 1:
        raise ValueError(f"cannot draw in {columns} x {rows} cells")
    cell_bytes = PAGE_SIZE
    while cell_bytes * columns * rows < within.size_bytes:
        cell_bytes *= 2
    cells = _cells(memory_map, within, cell_bytes, pinned, palette)
    digits = len(f"{within.end - 1:x}")
    lines = [
        f"{within.start + at * cell_bytes:#0{digits + 2}x} {''.join(cells[at : at + columns])}"
        for at in range(0, len(cells), columns)
    ]
    meaning = f"{palette.private} private  {palette.shared} shared  {palette.mixed} both  {palette.pinned} pinned  "
    last_line = f"{meaning if legend else ''}(1 cell = {format_size(cell_bytes)})"
    return "\n".join([*lines, " " * (digits + 3) + last_line])


def _cells(
    memory_map: Sequence[tuple[GpaRange, PageState]],
    within: GpaRange,
    cell_bytes: int,
    pinned: GpaRange | None,
    palette: Palette,
) -> list[str]:
    """Return a character for each cell, in time linear in cells and ranges."""
    has: dict[PageState, set[int]] = {state: set() for state in PageState}
    for range_, state in memory_map:
        has[state].update(_covered(range_, within, cell_bytes))
    holds_pinned = _covered(pinned, within, cell_bytes) if pinned is not None else range(0)

    def character(cell: int) -> str:
        private, shared = cell in has[PageState.PRIVATE], cell in has[PageState.SHARED]
        if private and shared:
            return palette.mixed
        if (private or shared) and cell in holds_pinned:
            return palette.pinned
        return palette.private if private else palette.shared if shared else " "

    return [character(cell) for cell in range(-(-within.size_bytes // cell_bytes))]


def _covered(range_: GpaRange, within: GpaRange, cell_bytes: int) -> range:
    """Return the cells that ``range_`` reaches into."""
    if not range_.overlaps(within):
        return range(0)
    start = max(range_.start, within.start) - within.start
    end = min(range_.end, within.end) - within.start
    return range(start // cell_bytes, -(-end // cell_bytes))
