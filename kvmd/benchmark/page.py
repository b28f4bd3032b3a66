"""Puts the tables of a run into docs/performance.md: ``python -m kvmd.benchmark.page RESULTS.json... PAGE.md``.

Each table stands in the page between two comments, ``<!-- tables of NAME -->`` and ``<!-- end -->``; what is between
them is replaced. A run of the lab's has a place of its own: its results are given as ``lab=RESULTS.json``, and its
tables go to ``<!-- tables of NAME in the lab -->``. Benchmarks that were not run keep what is there.
What `kvmd bench all` wrote fills ``<!-- tables of targets -->`` too: every figure that has one.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvmd.benchmark.tables import as_text, targets

_PLACE = re.compile(r"(<!-- tables of (?P<key>[a-z]+(?: in the lab)?) -->\n).*?(<!-- end -->)", re.DOTALL)


class PageError(Exception):
    """The page or the results are not what they should be; the message says which and how."""


def fill(page: str, tables: Mapping[str, str]) -> str:
    """Return the page with its tables replaced.

    Args:
        page: Markdown with places for tables.
        tables: by what the place's comment says: the text between.

    Raises:
        PageError: the page has no place for one of them.
    """
    keys = {match["key"] for match in _PLACE.finditer(page)}
    if homeless := tables.keys() - keys:
        raise PageError(f"the page has no place for {', '.join(sorted(homeless))}: add <!-- tables of NAME -->")

    def replaced(match: re.Match[str]) -> str:
        text = tables.get(match["key"])
        return match[0] if text is None else f"{match[1]}\n{text}\n{match[3]}"

    return _PLACE.sub(replaced, page)


def tables_of(document: Mapping[str, Any], where: str = "") -> dict[str, str]:
    """Return the tables of results, by the names of their places.

    Args:
        document: what `kvmd bench --json` printed, of one benchmark or all.
        where: what their places have after the name.

    Raises:
        PageError: it is something else.
    """
    try:
        every = document.get("benchmarks", [document])
        tables = {f"{report['name']}{where}": as_text(report) for report in every}
        if "benchmarks" in document and not where:
            tables["targets"] = targets(every)
    except (AttributeError, KeyError, TypeError) as error:
        raise PageError(f"these are no results of `kvmd bench --json`: {error!r} is missing or wrong") from error
    return tables


def main(arguments: Sequence[str]) -> int:
    """Fill the page that the last argument names with the results of the others."""
    if len(arguments) < 2:  # noqa: PLR2004 - results and a page
        print("usage: python -m kvmd.benchmark.page [lab=]RESULTS.json... PAGE.md", file=sys.stderr)
        return 2
    *results, page = arguments
    path = Path(page)
    try:
        text = path.read_text(encoding="utf-8")
        for result in results:
            is_lab = result.startswith("lab=")
            document = json.loads(Path(result.removeprefix("lab=")).read_text(encoding="utf-8"))
            text = fill(text, tables_of(document, " in the lab" if is_lab else ""))
        path.write_text(text, encoding="utf-8")
    except (OSError, ValueError, PageError) as error:
        print(f"kvmd.benchmark.page: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
