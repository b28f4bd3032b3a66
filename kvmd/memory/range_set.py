"""A set of pages as disjoint ranges: what is leaked, and little else, so it stays short."""

from __future__ import annotations

from collections.abc import Iterator

from kvmd.ranges import GpaRange


class RangeSet:
    """Pages, kept as the fewest disjoint ranges in order."""

    def __init__(self) -> None:
        self._ranges: list[GpaRange] = []

    def __iter__(self) -> Iterator[GpaRange]:
        return iter(tuple(self._ranges))

    def __bool__(self) -> bool:
        return bool(self._ranges)

    @property
    def size_bytes(self) -> int:
        """Bytes in all ranges together."""
        return sum(range_.size_bytes for range_ in self._ranges)

    def add(self, range_: GpaRange) -> None:
        """Add the pages of ``range_``."""
        apart = [other for other in self._ranges if not other.touches(range_)]
        joined = [other for other in self._ranges if other.touches(range_)]
        start = min([range_.start, *(other.start for other in joined)])
        end = max([range_.end, *(other.end for other in joined)])
        self._ranges = sorted([*apart, GpaRange(start, end)])

    def remove(self, range_: GpaRange) -> None:
        """Remove the pages of ``range_``; those that are not in the set do not matter."""
        left: list[GpaRange] = []
        for other in self._ranges:
            if not other.overlaps(range_):
                left.append(other)
                continue
            if other.start < range_.start:
                left.append(GpaRange(other.start, range_.start))
            if range_.end < other.end:
                left.append(GpaRange(range_.end, other.end))
        self._ranges = left

    def within(self, range_: GpaRange) -> tuple[GpaRange, ...]:
        """Return the parts of the set that lie in ``range_``."""
        return tuple(
            GpaRange(max(other.start, range_.start), min(other.end, range_.end))
            for other in self._ranges
            if other.overlaps(range_)
        )
