"""The option that names a part of guest memory."""

from __future__ import annotations

import click

from kvmd.units import parse_size


def gpa_range(ctx: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """Return the addresses ``[start, end)`` of ``START``, ``START-END`` or ``START+SIZE``."""
    if value is None:
        return None
    try:
        start, end = _parsed(value)
    except ValueError as error:
        message = f"{error}: write an address, START-END or START+SIZE, such as 0x200000+64K"
        raise click.BadParameter(message, ctx, parameter) from error
    if not 0 <= start < end <= 1 << 64:
        raise click.BadParameter(f"{value!r} holds no address", ctx, parameter)
    return start, end


def _parsed(value: str) -> tuple[int, int]:
    if "+" in value:
        first, _, size = value.partition("+")
        start = int(first, 0)
        return start, start + (int(size, 0) if size.startswith("0x") else parse_size(size))
    first, _, last = value.partition("-")
    start = int(first, 0)
    return start, int(last, 0) if last else start + 1
