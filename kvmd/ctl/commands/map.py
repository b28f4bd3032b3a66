"""``kvmctl map``: a machine's memory as a picture."""

from __future__ import annotations

import itertools
import shutil
import sys
from typing import Any

import click

from kvmd.ctl.acting import explained
from kvmd.ctl.answers import number, objects, text
from kvmd.ctl.client import Client, machine_target
from kvmd.ctl.errors import Mistake, NotKvmd, Refused
from kvmd.ctl.ranges_option import gpa_range
from kvmd.ctl.session import Session, ctl_command, machine_argument
from kvmd.ctl.text import shown, size

_PAGE = 65536
_RANGES_LIMIT = 1 << 24
"""More ranges than a machine's page state may fall into (``conversion.max_ranges``)."""

_COLUMNS_LIMIT = 128
_MARGIN = 24


@ctl_command("map")
@machine_argument("created", "running", "paused")
@click.option("--gpa", callback=gpa_range, metavar="RANGE", help="Only this part, such as 0x200000+64K.")
@click.option("--rows", type=click.IntRange(1, 1000), default=8, show_default=True, metavar="N", help="Rows, at most.")
@click.option("--columns", type=click.IntRange(1, 1000), metavar="N", help="Cells in a row.  [default: what fits]")
@click.option("--color", type=click.Choice(["auto", "always", "never"]), default="auto", show_default=True)
def map_command(
    session: Session, *, name: str, gpa: tuple[int, int] | None, rows: int, columns: int | None, color: str
) -> None:
    """Draw a machine's memory: what is private, what is shared, and what is pinned (never converts).

    --output json lists the ranges.
    """
    client = session.client()
    try:
        ranges = _all_ranges(client, name, gpa)
    except Refused as error:
        raise explained(client, error, name, "map") from error
    if session.wants_json:
        session.answer({"machine": name, "ranges": ranges}, None)
        return
    colored = sys.stdout.isatty() if color == "auto" else color == "always"
    drawn = _drawn(ranges, gpa, rows, columns or _columns())
    print(f"{shown(name)}: {_sums(ranges)}")
    print(_colored(drawn) if colored else drawn)


def _all_ranges(client: Client, name: str, gpa: tuple[int, int] | None) -> list[dict[str, Any]]:
    """Return the ranges of memory, or of the part that is drawn, in order."""
    found: list[dict[str, Any]] = []
    start = "0x0" if gpa is None else hex(gpa[0])
    while True:
        answer = client.get(machine_target(name, "memory", "map"), [("from", start), ("limit", _PAGE)])
        page = objects(answer, "ranges")
        found += page
        following = answer.get("next")
        reached = gpa is not None and page and _address(page[-1]) >= gpa[1]
        if not isinstance(following, str) or not page or reached:
            break
        if len(found) > _RANGES_LIMIT or following == start:
            raise NotKvmd("what answers on the socket is not kvmd: its map of memory has no end")
        start = following
    if gpa is None:
        return found
    low, high = gpa
    return [each for each in found if _address(each) < high and low < _address(each) + number(each, "size")]


def _address(entry: dict[str, Any]) -> int:
    try:
        return int(text(entry, "gpa"), 16)
    except ValueError as error:
        raise NotKvmd("what answers on the socket is not kvmd: an address of its map is none") from error


def _drawn(ranges: list[dict[str, Any]], gpa: tuple[int, int] | None, rows: int, columns: int) -> str:
    from kvmd.picture import ASCII, BLOCKS, picture  # noqa: PLC0415 - 20 ms that --output json does not need
    from kvmd.ranges import GpaRange, PageState  # noqa: PLC0415 - likewise
    from kvmd.units import page_ceil, page_floor  # noqa: PLC0415 - likewise

    try:
        entries = [
            (GpaRange.of_size(_address(each), number(each, "size")), PageState(text(each, "state"))) for each in ranges
        ]
        if gpa is not None:
            within = GpaRange(page_floor(gpa[0]), page_ceil(gpa[1]))
        elif entries:
            within = GpaRange(0, entries[-1][0].end)
        else:
            raise Mistake("there is no memory to draw")
        fixed = [range_ for (range_, _), each in zip(entries, ranges, strict=True) if each.get("pinned") is True]
        pinned = GpaRange(fixed[0].start, fixed[-1].end) if fixed else None
    except ValueError as error:
        raise NotKvmd("what answers on the socket is not kvmd: its map of memory is none") from error
    encoding = (sys.stdout.encoding or "ascii").lower()
    palette = BLOCKS if encoding.startswith("utf") else ASCII
    return picture(entries, within, pinned=pinned, columns=columns, rows=rows, palette=palette)


def _columns() -> int:
    """Return how many cells fit beside the addresses: a power of two, so that rows begin at round ones."""
    fits = max(8, min(_COLUMNS_LIMIT, shutil.get_terminal_size().columns - _MARGIN))
    return int(1 << (fits.bit_length() - 1))


def _sums(ranges: list[dict[str, Any]]) -> str:
    sums = dict.fromkeys(("private", "shared"), 0)
    for each in ranges:
        state = text(each, "state")
        sums[state] = sums.get(state, 0) + number(each, "size")
    pinned = sum(number(each, "size") for each in ranges if each.get("pinned") is True)
    also = [f"{size(pinned)} pinned"] if pinned else []
    pieces = f"{len(ranges):,} range" + ("" if len(ranges) == 1 else "s")
    return ", ".join([*(f"{size(sums[state])} {shown(state)}" for state in sums), *also, f"in {pieces}"])


_COLORS = {"█": "green", "#": "green", "░": "yellow", ".": "yellow", "▒": "cyan", "+": "cyan", "▓": "blue", "@": "blue"}


def _colored(drawn: str) -> str:
    """Return a picture with its cells in the colours of ``kvmd demo``; runs of one colour share an escape."""
    *rows, legend = drawn.split("\n")
    lines = []
    for row in rows:
        address, _, cells = row.partition(" ")
        runs = itertools.groupby(cells, key=_COLORS.get)
        lines.append(" ".join([address, "".join(click.style("".join(run), fg=color) for color, run in runs)]))
    marks = (click.style(mark, fg=_COLORS[mark]) if mark in _COLORS and mark not in "+." else mark for mark in legend)
    return "\n".join([*lines, "".join(marks)])
