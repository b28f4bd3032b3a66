"""What is shown to people: escaped, in columns, with times and sizes that are read at a glance."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from kvmd.units import format_size

_CELL_LIMIT = 64


def shown(text: object) -> str:
    """Return text that does nothing to a terminal: what cannot be printed is escaped, line breaks too.

    A machine's name, an image's path or a log line may hold whatever somebody wanted it to.
    """
    line = str(text)
    if line.isprintable():
        return line
    return "".join(character if character.isprintable() else _escaped(character) for character in line)


def cut(text: str, limit: int = _CELL_LIMIT) -> str:
    """Return text that is no longer than ``limit``, with an ellipsis where something is missing."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def columns(heading: Sequence[str], rows: Iterable[Sequence[object]], *, right: frozenset[int] = frozenset()) -> str:
    """Return lines of aligned columns.

    Args:
        heading: of each column.
        rows: cells, escaped and cut here.
        right: columns that are aligned on their right.
    """
    lines = [list(heading), *([cut(shown(cell)) for cell in row] for row in rows)]
    widths = [max(len(line[at]) for line in lines) for at in range(len(heading))]
    return "\n".join(
        "  ".join(cell.rjust(width) if at in right else cell.ljust(width) for at, (cell, width) in enumerate(cells))
        .rstrip()
        for cells in (zip(line, widths, strict=True) for line in lines)
    )  # fmt: skip


def size(size_bytes: object) -> str:
    """Return a number of bytes for people; whatever else it is, as it is."""
    return format_size(size_bytes) if isinstance(size_bytes, int) else shown(size_bytes)


def age(timestamp: object, *, now: float | None = None) -> str:
    """Return how long ago an RFC 3339 time in UTC was, such as ``3m``; a dash where there is none."""
    if not isinstance(timestamp, str):
        return "-"
    try:
        # The fraction is left out: no age is so precise.
        then = calendar_seconds(timestamp)
    except ValueError:
        return shown(timestamp)
    seconds = max(0, int((time.time() if now is None else now) - then))
    for unit, letter in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= unit:
            return f"{seconds // unit}{letter}"
    return f"{seconds}s"


def calendar_seconds(timestamp: str) -> int:
    """Return the seconds since the epoch of an RFC 3339 time in UTC.

    Raises:
        ValueError: it is none.
    """
    import calendar  # noqa: PLC0415 - few commands need it

    # By its places, not with strptime, which takes 5 ms to import.
    places = ((0, 4), (5, 7), (8, 10), (11, 13), (14, 16), (17, 19))
    return calendar.timegm(tuple(int(timestamp[start:end]) for start, end in places))


def clock(timestamp: object) -> str:
    """Return the time of day, with what fraction it has, of an RFC 3339 time."""
    text = shown(timestamp)
    return text[11:].removesuffix("Z") if text[10:11] == "T" else text


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
