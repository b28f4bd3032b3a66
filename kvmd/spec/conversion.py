"""Bounds on a machine's conversions: the table ``[conversion]`` of its file."""

from __future__ import annotations

from typing import Literal

import msgspec

from kvmd.toml_file import Keys
from kvmd.units import GIB, MIB, PAGE_MASK, PAGE_SIZE

_NO_PROGRESS_LIMIT = 1_000_000
_RANGES_LIMIT = 1 << 24
_RATE_LIMIT = 1_000_000

CONVERSION_KEYS = {
    "conversion.chunk": 'a size from 4 KiB to 1 GiB in pages of 4 KiB, such as "2M"',
    "conversion.no_progress_limit": f"a whole number from 1 to {_NO_PROGRESS_LIMIT}",
    "conversion.implicit": '"allow", "keep-explicit" or "deny"',
    "conversion.rate": f"a whole number from 1 to {_RATE_LIMIT}",
    "conversion.max_ranges": f"a whole number from 1 to {_RANGES_LIMIT}",
}
"""What would be right, by key: the second half of every message."""

_KEYS = Keys(CONVERSION_KEYS)


class ConversionSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Bounds on what conversions may cost the host.

    Attributes:
        chunk: the most bytes that one change converts at a time.
        no_progress_limit: how often the same fault may come back with nothing changed.
        max_ranges: the most ranges that page state may fall into.
        implicit: what becomes of implicit conversions: ``allow``; ``keep-explicit`` stops the machine where one would
            undo an explicit conversion; ``deny`` stops it at any.
        rate: the most changes a second in the long run, each of a chunk at most; None for no limit. A vCPU that asks
            while the machine is ahead of it is kept out of the guest until it is not.
    """

    chunk: int = 32 * MIB
    no_progress_limit: int = 8
    max_ranges: int = 65536
    implicit: Literal["allow", "keep-explicit", "deny"] = "allow"
    rate: int | None = None

    def __post_init__(self) -> None:
        _KEYS.need("conversion.chunk", self.chunk, PAGE_SIZE <= self.chunk <= GIB and not self.chunk & PAGE_MASK)
        _KEYS.need(
            "conversion.no_progress_limit",
            self.no_progress_limit,
            1 <= self.no_progress_limit <= _NO_PROGRESS_LIMIT,
        )
        # The type says so too, but a spec that a program makes has not been through msgspec.
        _KEYS.need("conversion.implicit", self.implicit, self.implicit in {"allow", "keep-explicit", "deny"})
        _KEYS.need("conversion.max_ranges", self.max_ranges, 1 <= self.max_ranges <= _RANGES_LIMIT)
        _KEYS.need("conversion.rate", self.rate, self.rate is None or 1 <= self.rate <= _RATE_LIMIT)
