"""Reports as Markdown tables, for people and for docs/performance.md, and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from kvmd.benchmark.conditions import in_words
from kvmd.benchmark.measure import Report, Series, middle

_SIGNIFICANT = 3
_RATIO_HEAD = ("measured", "median", "beside", "median", "ratio", "middle half", "min", "max", "rounds", "target")
_FACT_HEAD = ("measured", "median", "middle half", "min", "max", "rounds", "target")


def render(report: Report) -> str:
    """Return the report as text, with its title."""
    return f"## {report.name}: {report.title}\n\n{as_text(as_json(report))}"


def as_text(report: Mapping[str, Any]) -> str:
    """Return what ``as_json`` made as Markdown, without a title."""
    parts = []
    if report["ratios"]:
        parts.append(_table(_RATIO_HEAD, [_ratio_row(ratio) for ratio in report["ratios"]]))
    if report["facts"]:
        parts.append(_table(_FACT_HEAD, [_fact_row(fact) for fact in report["facts"]]))
    notes = [*report["notes"], *(f"not measured: {what}" for what in report["missing"])]
    if report["conditions"]:
        notes.append(in_words(report["conditions"]))
    if notes:
        parts.append("\n".join(f"- {note}" for note in notes))
    return "\n\n".join(parts) + "\n"


def targets(reports: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of every figure that has a target, out of what ``as_json`` made of several reports."""
    rows: list[list[str]] = []
    for report in reports:
        rows += [_target_row(report["name"], row) for row in report["ratios"] if row["target"] is not None]
        found = [_fact_row(row) for row in report["facts"] if row["target"] is not None]
        rows += [[report["name"], *cells[:3], cells[-1]] for cells in found]
    return _table(("benchmark", "what", "measured", "middle half", "target"), rows) + "\n"


def _target_row(name: str, row: Mapping[str, Any]) -> list[str]:
    cells = _ratio_row(row)
    return [name, f"{cells[0]}, beside {cells[2]}", cells[4], cells[5], cells[-1]]


def as_json(report: Report) -> dict[str, object]:
    """Return the report as what ``json.dumps`` takes: every round's values, and the medians."""
    return {
        "name": report.name,
        "title": report.title,
        **report.figures,
        "conditions": report.conditions,
        "ratios": [
            {
                "subject": _series_json(ratio.subject),
                "beside": _series_json(ratio.beside),
                "ratio": spread(ratio.ratios),
                "target": ratio.target,
            }
            for ratio in report.ratios
        ],
        "facts": [{**_series_json(fact.series), "target": fact.target} for fact in report.facts],
        "notes": report.notes,
        "missing": report.missing,
    }


def spread(values: Sequence[float]) -> dict[str, object]:
    """Return the median of values, how far they lie apart, and how many there are."""
    return {
        "median": median(values),
        "quartiles": list(middle(values)),
        "min": min(values),
        "max": max(values),
        "rounds": len(values),
    }


def _series_json(series: Series) -> dict[str, object]:
    return {"label": series.label, "unit": series.unit, **spread(series.values), "values": list(series.values)}


def _ratio_row(row: Mapping[str, Any]) -> list[str]:
    subject, beside, ratio = row["subject"], row["beside"], row["ratio"]
    return [
        subject["label"],
        _value(subject["median"], subject["unit"]),
        beside["label"],
        _value(beside["median"], beside["unit"]),
        f"**{ratio['median']:.2f}**",
        "{:.2f} to {:.2f}".format(*ratio["quartiles"]),
        f"{ratio['min']:.2f}",
        f"{ratio['max']:.2f}",
        str(ratio["rounds"]),
        _target(ratio["median"], row["target"], ""),
    ]


def _fact_row(row: Mapping[str, Any]) -> list[str]:
    return [
        row["label"],
        f"**{_value(row['median'], row['unit'])}**",
        " to ".join(_value(value, "") for value in row["quartiles"]),
        _value(row["min"], row["unit"]),
        _value(row["max"], row["unit"]),
        str(row["rounds"]),
        _target(row["median"], row["target"], row["unit"]),
    ]


def _target(measured: float, target: float | None, unit: str) -> str:
    if target is None:
        return ""
    return f"≤ {_value(target, unit)}: {'met' if measured <= target else 'missed'}"


def _value(value: float, unit: str) -> str:
    """Return three significant digits and the unit, without an exponent."""
    digits = f"{value:.{_SIGNIFICANT}g}"
    if "e" in digits:
        digits = f"{value:.0f}"
    return f"{digits} {unit}".strip()


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    # Labels to the left, figures to the right.
    is_text = [column == 0 or head[column] in {"what", "beside", "target"} for column in range(len(head))]
    rule = [("-" * width) if text else "-" * (width - 1) + ":" for width, text in zip(widths, is_text, strict=True)]
    lines = []
    for row in (head, rule, *rows):
        cells = [
            cell.ljust(width) if text else cell.rjust(width)
            for cell, width, text in zip(row, widths, is_text, strict=True)
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
