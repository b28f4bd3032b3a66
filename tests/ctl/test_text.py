from __future__ import annotations

import pytest

from kvmd.ctl.text import age, clock, columns, cut, shown


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("plain ü 漢", "plain ü 漢"),
        ("\x1b[2J", "\\x1b[2J"),
        ("a\nb\tc\r", "a\\nb\\tc\\r"),
        ("\x9b\u202e\udc80\u2028", "\\x9b\\u202e\\udc80\\u2028"),
        (7, "7"),
        (None, "None"),
    ],
)
def test_nothing_reaches_a_terminal_but_text(text: object, safe: str) -> None:
    assert shown(text) == safe
    assert shown(text).isprintable()


def test_columns_are_aligned_and_bounded() -> None:
    rows: list[list[object]] = [["a", 1], ["long\x1b", 100], ["x" * 100, ""]]
    lines = columns(("NAME", "N"), rows, right=frozenset({1})).splitlines()
    assert lines[1].startswith("a ")
    assert lines[1].endswith("   1")
    assert lines[2].startswith("long\\x1b ")
    assert lines[3] == "x" * 61 + "..."


@pytest.mark.parametrize(
    ("then", "text"),
    [
        ("2026-01-01T00:00:00.000000Z", "10s"),
        ("2025-12-31T23:57:00Z", "3m"),
        ("2025-12-31T21:00:00Z", "3h"),
        ("2025-12-29T00:00:00Z", "3d"),
        ("2026-02-01T00:00:00Z", "0s"),
        (None, "-"),
        ("nonsense", "nonsense"),
        ("\x1b", "\\x1b"),
    ],
)
def test_ages(then: object, text: str) -> None:
    assert age(then, now=1767225610.0) == text


def test_clock_and_cut() -> None:
    assert clock("2026-01-01T10:11:12.5Z") == "10:11:12.5"
    assert clock("x") == "x"
    assert cut("abcdef", 5) == "ab..."
