"""Whether the software CPU is there: its emulator is an optional package."""

from __future__ import annotations

from functools import cache

EXTRA = "software"
"""The extra of kvmd that brings the emulator."""


@cache
def missing_emulator() -> str | None:
    """Return why the emulator cannot be used, and how to get it; None where it can."""
    try:
        import unicorn  # noqa: F401, PLC0415 - the one import that may fail
    except ImportError as error:
        what = "is not installed" if error.name == "unicorn" else f"cannot be loaded ({error})"
        return f"the package unicorn {what}: install kvmd[{EXTRA}], such as with pip install 'kvmd[{EXTRA}]'"
    return None
