"""The most recent conversion records, for any number of readers that may be slower than the guest.

The service appends and never waits; each reader has a cursor of its own, and what it was too slow for is
counted, never hidden. Everything here belongs to one thread (the event loop's), and knows of no event loop: a
reader that has nothing to read leaves a callback.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvmd.conversion.record import ConversionRecord

DEFAULT_CAPACITY = 65536
"""Records kept: some 20 MB when full, and more than ten seconds of the fastest traffic seen."""


class RecordRing:
    """The last ``capacity`` records.

    Raises:
        ValueError: ``capacity`` is below 1.
    """

    def __init__(self, capacity: int = DEFAULT_CAPACITY) -> None:
        if capacity < 1:
            raise ValueError(f"needs room for at least one record, not {capacity}")
        self._capacity = capacity
        self._slots: list[ConversionRecord] = []
        self._appended = 0
        self._waiting: list[Callable[[], None]] = []

    @property
    def capacity(self) -> int:
        """Records kept at most."""
        return self._capacity

    @property
    def appended(self) -> int:
        """Records appended so far, those that were overwritten included."""
        return self._appended

    def append(self, record: ConversionRecord) -> None:
        """Add ``record``, over the oldest one where the ring is full, and wake who waits. O(1)."""
        self.extend((record,))

    def extend(self, records: Sequence[ConversionRecord]) -> None:
        """Add some in order, as ``append`` does."""
        if self._appended + len(records) <= self._capacity:
            self._slots.extend(records)
            self._appended += len(records)
        else:
            for record in records:
                if self._appended < self._capacity:
                    self._slots.append(record)
                else:
                    self._slots[self._appended % self._capacity] = record
                self._appended += 1
        if self._waiting and records:
            waiting, self._waiting = self._waiting, []
            for wake in waiting:
                wake()

    def reader(self, *, from_oldest: bool = False) -> RecordReader:
        """Return a cursor that starts at the next record, or at the oldest one kept."""
        start = max(0, self._appended - self._capacity) if from_oldest else self._appended
        return RecordReader(self, start)


class RecordReader:
    """One reader's place in a ring: made by ``RecordRing.reader``."""

    def __init__(self, ring: RecordRing, position: int) -> None:
        self._ring = ring
        self._position = position

    @property
    def unread(self) -> int:
        """Records appended since the last ``take``, the lost ones included."""
        return self._ring._appended - self._position  # noqa: SLF001 - the two are one unit, and this is hot

    def take(self, limit: int) -> tuple[int, list[ConversionRecord]]:
        """Return how many records were overwritten unread, and the next ones after those, at most ``limit``.

        Raises:
            ValueError: ``limit`` is below 1.
        """
        if limit < 1:
            raise ValueError(f"takes at least one record, not {limit}")
        ring = self._ring
        appended, capacity, slots = ring._appended, ring._capacity, ring._slots  # noqa: SLF001 - as above
        lost = max(0, appended - capacity - self._position)
        start = self._position + lost
        end = min(appended, start + limit)
        self._position = end
        if start == end:
            return lost, []
        first, last = start % capacity, end % capacity
        if first < last:
            return lost, slots[first:last]
        return lost, slots[first:] + slots[:last]

    def wake_once(self, wake: Callable[[], None]) -> None:
        """Call ``wake`` once: now where something is unread, else inside the next ``append``.

        ``wake`` must neither block nor raise. ``forget`` takes it back.
        """
        if self.unread:
            wake()
        else:
            self._ring._waiting.append(wake)  # noqa: SLF001 - as above

    def forget(self, wake: Callable[[], None]) -> None:
        """Take back a callback that has perhaps not been called yet."""
        if wake in self._ring._waiting:  # noqa: SLF001 - as above
            self._ring._waiting.remove(wake)  # noqa: SLF001 - as above
