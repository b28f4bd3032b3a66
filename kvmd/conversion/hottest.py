"""The ranges that were converted most, in constant memory: the Space-Saving algorithm.

Metwally, Agrawal and El Abbadi, 'Efficient Computation of Frequent and Top-k Elements in Data Streams'
(2005). With ``capacity`` counters and ``n`` conversions seen, any range that was converted more than ``n /
capacity`` times is listed, and no count is too high by more than ``n / capacity``; no count is ever too
low. While at most ``capacity`` different ranges were converted, all counts are exact.
"""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_CAPACITY = 1024
"""Counters: about 250 KiB of Python objects."""


@dataclass(frozen=True, slots=True)
class HotRange:
    """One range and how often it was converted.

    Attributes:
        gpa: start in bytes.
        size_bytes: length in bytes; nearly always one page.
        count: conversions, at most ``overcount`` too high.
        overcount: how much of ``count`` may belong to ranges that were dropped.
    """

    gpa: int
    size_bytes: int
    count: int
    overcount: int


class HottestRanges:
    """Counts conversions by range; one thread at a time. ``add`` is O(1) at worst.

    The counters lie in a bucket for each count, so that the smallest is found without a heap: a range only
    ever moves to the bucket after its own, and a newcomer takes over a counter of the smallest.

    Raises:
        ValueError: ``capacity`` is below 1.
    """

    __slots__ = ("_buckets", "_capacity", "_counts", "_smallest")

    def __init__(self, capacity: int = DEFAULT_CAPACITY) -> None:
        if capacity < 1:
            raise ValueError(f"needs at least one counter, not {capacity}")
        self._capacity = capacity
        self._counts: dict[tuple[int, int], int] = {}
        self._buckets: dict[int, dict[tuple[int, int], int]] = {}
        self._smallest = 0

    def add(self, gpa: int, size_bytes: int) -> None:
        """Count one conversion of ``size_bytes`` at ``gpa``, both in bytes."""
        key = (gpa, size_bytes)
        count = self._counts.get(key, 0)
        overcount = 0
        if count:
            overcount = self._buckets[count].pop(key)
        elif len(self._counts) >= self._capacity:
            # The last one in: any of the smallest may go, and popitem is the one way that is O(1).
            count = overcount = self._smallest
            del self._counts[self._buckets[count].popitem()[0]]
        else:
            self._smallest = 0
        self._counts[key] = count + 1
        following = self._buckets.get(count + 1)
        if following is None:
            self._buckets[count + 1] = {key: overcount}
        else:
            following[key] = overcount
        if not self._buckets.get(count):
            self._buckets.pop(count, None)
            # Whatever emptied the smallest bucket has just gone into the next one.
            if self._smallest == count:
                self._smallest = count + 1

    def top(self, limit: int) -> tuple[HotRange, ...]:
        """Return at most ``limit`` ranges, the most converted first, then by gpa."""
        found: list[HotRange] = []
        for count in sorted(self._buckets, reverse=True):
            for (gpa, size_bytes), overcount in sorted(self._buckets[count].items()):
                if len(found) >= limit:
                    return tuple(found)
                found.append(HotRange(gpa, size_bytes, count, overcount))
        return tuple(found)
