"""Reports as Markdown tables, for people and for docs/performance.md, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence

from bench.measure import Fact, Ratio, Report, Series

_SIGNIFICANT = 3
_RATIO_HEAD = ("measured", "median", "beside", "median", "ratio", "min", "max", "rounds", "target")
_FACT_HEAD = ("measured", "median", "min", "max", "rounds", "target")


def render(report: Report) -> str:
    """Return the report as text."""
    parts = [f"## {report.name}: {report.title}"]
    if report.ratios:
        parts.append(_table(_RATIO_HEAD, [_ratio_row(ratio) for ratio in report.ratios]))
    if report.facts:
        parts.append(_table(_FACT_HEAD, [_fact_row(fact) for fact in report.facts]))
    if report.notes:
        parts.append("\n".join(f"- {note}" for note in report.notes))
    return "\n\n".join(parts) + "\n"


def as_json(report: Report) -> dict[str, object]:
    """Return the report as what ``json.dumps`` takes: every round's values, and the medians."""
    return {
        "name": report.name,
        "title": report.title,
        "ratios": [
            {
                "subject": _series_json(ratio.subject),
                "beside": _series_json(ratio.beside),
                "ratio": {"median": ratio.median, "min": min(ratio.ratios), "max": max(ratio.ratios)},
                "rounds": len(ratio.ratios),
                "target": ratio.target,
            }
            for ratio in report.ratios
        ],
        "facts": [{**_series_json(fact.series), "target": fact.target} for fact in report.facts],
        "notes": report.notes,
    }


def _series_json(series: Series) -> dict[str, object]:
    return {"label": series.label, "unit": series.unit, "median": series.median, "values": list(series.values)}


def _ratio_row(ratio: Ratio) -> list[str]:
    return [
        ratio.subject.label,
        _value(ratio.subject.median, ratio.subject.unit),
        ratio.beside.label,
        _value(ratio.beside.median, ratio.beside.unit),
        f"**{ratio.median:.2f}**",
        f"{min(ratio.ratios):.2f}",
        f"{max(ratio.ratios):.2f}",
        str(len(ratio.ratios)),
        _target(ratio.median, ratio.target, ""),
    ]


def _fact_row(fact: Fact) -> list[str]:
    series = fact.series
    return [
        series.label,
        f"**{_value(series.median, series.unit)}**",
        _value(min(series.values), series.unit),
        _value(max(series.values), series.unit),
        str(len(series.values)),
        _target(series.median, fact.target, series.unit),
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
    is_text = [column == 0 or head[column] in {"beside", "target"} for column in range(len(head))]
    rule = [("-" * width) if text else "-" * (width - 1) + ":" for width, text in zip(widths, is_text, strict=True)]
    lines = []
    for row in (head, rule, *rows):
        cells = [
            cell.ljust(width) if text else cell.rjust(width)
            for cell, width, text in zip(row, widths, is_text, strict=True)
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
