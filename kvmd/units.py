"""Sizes: bytes everywhere inside, friendly text only where a person reads or writes it."""

from __future__ import annotations

import re

PAGE_SIZE = 4096
"""Bytes in the page that conversions count in: always 4 KiB, whatever maps the memory."""

PAGE_MASK = PAGE_SIZE - 1

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40

_SUFFIXES = {"": 1, "K": KIB, "M": MIB, "G": GIB, "T": TIB}
_SIZE = re.compile(r"([0-9]+)\s*([KMGT]?)(?:i?B)?", re.ASCII | re.IGNORECASE)


def parse_size(text: str) -> int:
    """Return the bytes that ``text`` (``"64M"``, ``"1 GiB"``, ``"4096"``) stands for.

    Suffixes are powers of 1024.

    Raises:
        ValueError: the text is not a size; the message says what would be.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size: write a whole number with K, M, G or T, such as 64M")
    return int(match[1]) * _SUFFIXES[match[2].upper()]


def format_size(size_bytes: int) -> str:
    """Return ``size_bytes`` in the largest binary unit that divides it well, such as ``"64 MiB"``."""
    for unit, name in ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        # Where rounding would make 1024 of a unit, the next one says it better.
        if size_bytes * 20 >= unit * 20 - unit // 1024:
            text = f"{size_bytes / unit:.1f}".removesuffix(".0")
            return f"{text} {name}"
    return f"{size_bytes} B"


def page_floor(gpa: int) -> int:
    """Return the start of the page that holds ``gpa``."""
    return gpa & ~PAGE_MASK


def page_ceil(gpa: int) -> int:
    """Return the first page boundary at or above ``gpa``."""
    return (gpa + PAGE_MASK) & ~PAGE_MASK
