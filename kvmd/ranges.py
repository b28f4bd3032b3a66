"""Half-open ranges of guest-physical addresses, and the two states a page of them can be in."""

from __future__ import annotations

import enum
from typing import Final

import msgspec

from kvmd.units import PAGE_MASK, PAGE_SIZE

GPA_LIMIT = 1 << 52
"""One past the highest guest-physical address of x86 (AMD64 APM volume 2, 5.3: 52 bits)."""


class PageState(enum.Enum):
    """Who can see a page: only the guest (private), or the host's devices too (shared)."""

    PRIVATE = "private"
    SHARED = "shared"

    # The members are singletons. Enum's own hash calls back into Python, once for each look into a dictionary of both.
    __hash__ = object.__hash__

    @property
    def opposite(self) -> PageState:
        """The other state."""
        return SHARED if self is PRIVATE else PRIVATE


PRIVATE: Final = PageState.PRIVATE
SHARED: Final = PageState.SHARED
"""The two for what every conversion runs through: CPython 3.11 takes 700 instructions to find a member in its Enum."""


class GpaRange(msgspec.Struct, frozen=True, order=True, gc=False):
    """Guest-physical addresses ``[start, end)`` in bytes: page-aligned, not empty, without the C-bit.

    Raises:
        ValueError: empty, unaligned, negative, or reaching past ``GPA_LIMIT``.
    """

    start: int
    end: int

    def __post_init__(self) -> None:
        start, end = self.start, self.end
        if 0 <= start < end <= GPA_LIMIT and not (start | end) & PAGE_MASK:
            return
        if not 0 <= start < end <= GPA_LIMIT:
            raise ValueError(f"[{self.start:#x}, {self.end:#x}) is empty or not within [0, {GPA_LIMIT:#x})")
        raise ValueError(f"[{self.start:#x}, {self.end:#x}) is not aligned to {PAGE_SIZE} bytes")

    @classmethod
    def of_size(cls, gpa: int, size_bytes: int) -> GpaRange:
        """Return ``[gpa, gpa + size_bytes)``."""
        return cls(gpa, gpa + size_bytes)

    @property
    def size_bytes(self) -> int:
        """Length in bytes."""
        return self.end - self.start

    @property
    def pages(self) -> int:
        """Length in 4 KiB pages."""
        return (self.end - self.start) // PAGE_SIZE

    def overlaps(self, other: GpaRange) -> bool:
        """Tell whether any page is in both."""
        return self.start < other.end and other.start < self.end

    def contains(self, other: GpaRange) -> bool:
        """Tell whether every page of ``other`` is in this range."""
        return self.start <= other.start and other.end <= self.end

    def touches(self, other: GpaRange) -> bool:
        """Tell whether the two overlap or are adjacent, so that their union is one range."""
        return self.start <= other.end and other.start <= self.end

    def __str__(self) -> str:
        return f"[{self.start:#x}, {self.end:#x})"
