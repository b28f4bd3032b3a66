"""Which pages of guest memory are private and which are shared: an interval map with generations.

KVM has no ioctl that reads memory attributes back, so this map is the only truth (kvm-api,
KVM_SET_MEMORY_ATTRIBUTES). It costs nothing for memory that was never converted, whatever its size.

Libraries were tried first: ``portion.IntervalDict`` takes about seven milliseconds for an update among a thousand
intervals, and ``intervaltree`` neither merges neighbours nor keeps intervals disjoint. Four parallel lists and
``bisect`` from the standard library take three microseconds.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from kvmd.ranges import GpaRange, PageState


@dataclass(frozen=True, slots=True)
class Segment:
    """Neighbouring pages in one state.

    Attributes:
        range: the pages.
        state: private or shared.
        generation: change sequence of their last conversion, 0 for none. Where segments were merged, the
            highest of theirs.
        explicit_generation: the same, counting explicit conversions only.
    """

    range: GpaRange
    state: PageState
    generation: int
    explicit_generation: int

    @property
    def is_explicit(self) -> bool:
        """Tell whether the last conversion of these pages was an explicit one."""
        return 0 < self.generation == self.explicit_generation


class PageStateMap:
    """The state of every page of ``[0, size_bytes)``.

    Args:
        size_bytes: the memory's size in bytes, a multiple of the page.
        initial: the state that all of it starts in.
    """

    def __init__(self, size_bytes: int, initial: PageState) -> None:
        self._range = GpaRange(0, size_bytes)
        self._starts = [0]
        self._states = [initial]
        self._generations = [0]
        self._explicit = [0]

    def __len__(self) -> int:
        """The number of segments: what the map's memory and time grow with."""
        return len(self._starts)

    @property
    def range(self) -> GpaRange:
        """All that the map covers."""
        return self._range

    def segment_at(self, gpa: int) -> Segment:
        """Return the whole segment that holds ``gpa``.

        Raises:
            IndexError: ``gpa`` is outside memory.
        """
        if not 0 <= gpa < self._range.end:
            raise IndexError(f"{gpa:#x} is outside memory {self._range}")
        return self._segment(bisect_right(self._starts, gpa) - 1)

    def segments(self, within: GpaRange | None = None) -> Iterator[Segment]:
        """Yield the segments that overlap ``within``, clipped to it, in order."""
        within = within or self._range
        index = bisect_right(self._starts, within.start) - 1
        while index < len(self._starts) and self._starts[index] < within.end:
            whole = self._segment(index)
            if within.contains(whole.range):
                yield whole
            else:
                clipped = GpaRange(max(whole.range.start, within.start), min(whole.range.end, within.end))
                yield Segment(clipped, whole.state, whole.generation, whole.explicit_generation)
            index += 1

    def state_of(self, range_: GpaRange) -> PageState | None:
        """Return the state that all pages of the range are in, or None where they differ."""
        starts, end = self._starts, range_.end
        index = bisect_right(starts, range_.start) - 1
        state = self._states[index]
        for other in range(index + 1, len(starts)):
            if starts[other] >= end:
                break
            if self._states[other] is not state:
                return None
        return state

    def look(self, range_: GpaRange) -> tuple[PageState | None, int]:
        """Return what ``state_of`` does, and the highest generation of the range's pages."""
        starts, end = self._starts, range_.end
        index = bisect_right(starts, range_.start) - 1
        past = index + 1
        if past == len(starts) or end <= starts[past]:
            return self._states[index], self._generations[index]
        return self.state_of(range_), max(self._generations[index : bisect_left(starts, end, past)])

    def runs(self, state: PageState, within: GpaRange | None = None) -> Iterator[GpaRange]:
        """Yield the longest runs of pages in ``within`` that are in ``state``, in order."""
        start = end = -1
        for segment in self.segments(within):
            if segment.state is not state:
                continue
            if segment.range.start != end:
                if end >= 0:
                    yield GpaRange(start, end)
                start = segment.range.start
            end = segment.range.end
        if end >= 0:
            yield GpaRange(start, end)

    def first_in_state(self, state: PageState, within: GpaRange) -> int | None:
        """Return the first gpa in ``within`` that is in ``state``, or None."""
        index = bisect_right(self._starts, within.start) - 1
        while index < len(self._starts) and self._starts[index] < within.end:
            if self._states[index] is state:
                return max(self._starts[index], within.start)
            index += 1
        return None

    def end_in_state(self, state: PageState, within: GpaRange) -> int:
        """Return the end of the last run in ``within`` that is in ``state``; its start where there is none."""
        index = bisect_left(self._starts, within.end) - 1
        while index >= 0 and self._end(index) > within.start:
            if self._states[index] is state:
                return min(self._end(index), within.end)
            index -= 1
        return within.start

    def set(self, range_: GpaRange, state: PageState, generation: int, *, explicit: bool) -> None:
        """Record that the range was converted to ``state`` by change number ``generation``.

        An implicit conversion keeps the newest explicit generation of the pages: a fault that is older than
        that one stays stale.

        Raises:
            IndexError: the range reaches outside memory.
        """
        if range_.end > self._range.end:
            raise IndexError(f"{range_} is outside memory {self._range}")
        starts = self._starts
        first = bisect_right(starts, range_.start) - 1
        past = first + 1
        end = starts[past] if past < len(starts) else self._range.end
        if end == range_.end and starts[first] == range_.start:
            # A whole segment, as nearly always.
            self._states[first] = state
            self._generations[first] = generation
            if explicit:
                self._explicit[first] = generation
            return
        explicit_generation = generation
        if not explicit:
            past = bisect_left(self._starts, range_.end)
            explicit_generation = max(self._explicit[first:past])
        first = self._cut(range_.start)
        past = self._cut(range_.end)
        self._replace(first, past, range_.start, state, generation, explicit_generation)

    def compact(self) -> None:
        """Merge neighbours in the same state whose last conversions had the same cause.

        Their generations may differ; the merged segment has the highest. A generation that grew this way makes at most
        one fault look stale or one retry look like progress, and the guest only tries once more.
        """
        kept = 0
        for index in range(1, len(self._starts)):
            if self._states[index] is self._states[kept] and self._is_explicit(index) == self._is_explicit(kept):
                self._generations[kept] = max(self._generations[kept], self._generations[index])
                self._explicit[kept] = max(self._explicit[kept], self._explicit[index])
            else:
                kept += 1
                self._starts[kept] = self._starts[index]
                self._states[kept] = self._states[index]
                self._generations[kept] = self._generations[index]
                self._explicit[kept] = self._explicit[index]
        for column in (self._starts, self._states, self._generations, self._explicit):
            del column[kept + 1 :]

    def coalesced(self) -> list[tuple[GpaRange, PageState]]:
        """Return all memory as the fewest ranges, generations left out."""
        merged: list[tuple[GpaRange, PageState]] = []
        start = 0
        for index in range(1, len(self._starts) + 1):
            if index == len(self._starts) or self._states[index] is not self._states[index - 1]:
                end = self._end(index - 1)
                merged.append((GpaRange(start, end), self._states[index - 1]))
                start = end
        return merged

    def _is_explicit(self, index: int) -> bool:
        return 0 < self._generations[index] == self._explicit[index]

    def _end(self, index: int) -> int:
        return self._starts[index + 1] if index + 1 < len(self._starts) else self._range.end

    def _segment(self, index: int) -> Segment:
        return Segment(
            GpaRange(self._starts[index], self._end(index)),
            self._states[index],
            self._generations[index],
            self._explicit[index],
        )

    def _cut(self, gpa: int) -> int:
        """Make a segment start at ``gpa`` and return its index; past the last one at the end of memory."""
        index = bisect_left(self._starts, gpa)
        if gpa == self._range.end or self._starts[index : index + 1] == [gpa]:
            return index
        self._starts.insert(index, gpa)
        for column in (self._generations, self._explicit):
            column.insert(index, column[index - 1])
        self._states.insert(index, self._states[index - 1])
        return index

    def _replace(self, first: int, past: int, start: int, state: PageState, generation: int, explicit: int) -> None:
        self._starts[first:past] = [start]
        self._states[first:past] = [state]
        self._generations[first:past] = [generation]
        self._explicit[first:past] = [explicit]
