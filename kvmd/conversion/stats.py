"""Counters of a machine's conversions: how many, of which kind, how long they took, and where."""

from __future__ import annotations

from dataclasses import dataclass

from kvmd.conversion.histogram import LatencyHistogram, Percentiles
from kvmd.conversion.hottest import HotRange, HottestRanges
from kvmd.conversion.messages import CONVERTED, Cause, Outcome
from kvmd.conversion.record import ConversionRecord
from kvmd.conversion.ring import RecordReader
from kvmd.ranges import PRIVATE, PageState
from kvmd.units import PAGE_MASK, PAGE_SIZE

HOTTEST_SHOWN = 16
"""Ranges that a snapshot lists."""

_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class RequestCount:
    """How many requests of one kind ended in one way: never 0."""

    cause: Cause
    to: PageState
    outcome: Outcome
    requests: int


@dataclass(frozen=True, slots=True)
class StatsSnapshot:
    """The counters at one moment. Latencies are in microseconds.

    Attributes:
        counts: one entry for each kind of request that there was, in the order of the enums.
        pages_to_private: 4 KiB pages that became private, each as often as it did.
        pages_to_shared: the same of shared.
        waiting: from a vCPU's exit to the start of its change, or to the answer: every request.
        applying: in changing attributes or slots: requests that a change answered.
        discarding: in discarding the side left behind: the same requests.
        total: the three together: every request.
        hottest: the ranges that were converted most, at most ``HOTTEST_SHOWN``.
        uncounted: records that the source had dropped before they were counted.
        first_monotonic_ns: when the first request was answered, or None.
        last_monotonic_ns: when the last one was, or None.
    """

    counts: tuple[RequestCount, ...]
    pages_to_private: int
    pages_to_shared: int
    waiting: Percentiles
    applying: Percentiles
    discarding: Percentiles
    total: Percentiles
    hottest: tuple[HotRange, ...]
    uncounted: int
    first_monotonic_ns: int | None
    last_monotonic_ns: int | None

    def requests(
        self, *, cause: Cause | None = None, to: PageState | None = None, outcome: Outcome | None = None
    ) -> int:
        """Return how many requests were of the given kind; None stands for any."""
        return sum(
            count.requests
            for count in self.counts
            if cause in {None, count.cause} and to in {None, count.to} and outcome in {None, count.outcome}
        )

    @property
    def conversions(self) -> int:
        """Requests that changed the state of memory."""
        return self.requests(outcome=CONVERTED)

    @property
    def conversions_per_second(self) -> float:
        """Conversions over the time from the first answer to the last; 0 where that is no time at all."""
        if self.first_monotonic_ns is None or self.last_monotonic_ns is None:
            return 0.0
        elapsed_ns = self.last_monotonic_ns - self.first_monotonic_ns
        return self.conversions * 1e9 / elapsed_ns if elapsed_ns > 0 else 0.0


class ConversionStats:
    """Counts every answered request, in constant memory and 3 to 5 microseconds; one thread at a time."""

    def __init__(self, source: RecordReader | None = None) -> None:
        self._source = source
        # By identity: the members of an enum are singletons, and hashing one calls back into Python.
        self._requests = {
            (id(cause), id(to), id(outcome)): 0 for cause in Cause for to in PageState for outcome in Outcome
        }
        self._pages_to_private = 0
        self._pages_to_shared = 0
        self._waiting = LatencyHistogram()
        self._applying = LatencyHistogram()
        self._discarding = LatencyHistogram()
        self._total = LatencyHistogram()
        self._hottest = HottestRanges()
        self._uncounted = 0
        self._first_monotonic_ns: int | None = None
        self._last_monotonic_ns: int | None = None

    def add(self, record: ConversionRecord) -> None:
        """Count one answered request."""
        outcome, to = record.outcome, record.to
        self._requests[id(record.cause), id(to), id(outcome)] += 1
        waiting_us = record.waiting_ns / 1000
        self._waiting.add(waiting_us)
        if record.merged:
            applying_us, discarding_us = record.applying_ns / 1000, record.discarding_ns / 1000
            self._applying.add(applying_us)
            self._discarding.add(discarding_us)
            self._total.add(waiting_us + applying_us + discarding_us)
        else:
            self._total.add(waiting_us)
        if outcome is CONVERTED:
            # An access that arrived as MMIO is a few bytes anywhere in its page.
            start = record.gpa & ~PAGE_MASK
            size_bytes = ((record.gpa + record.size_bytes + PAGE_MASK) & ~PAGE_MASK) - start
            if to is PRIVATE:
                self._pages_to_private += size_bytes // PAGE_SIZE
            else:
                self._pages_to_shared += size_bytes // PAGE_SIZE
            self._hottest.add(start, size_bytes)
        if self._first_monotonic_ns is None:
            self._first_monotonic_ns = record.monotonic_ns
        self._last_monotonic_ns = record.monotonic_ns

    def catch_up(self, limit: int) -> bool:
        """Count at most ``limit`` records of the source, and tell whether there are more."""
        if self._source is None:
            return False
        lost, records = self._source.take(limit)
        self._uncounted += lost
        for record in records:
            self.add(record)
        return self._source.unread > 0

    def snapshot(self) -> StatsSnapshot:
        """Return the counters as they are now, with all that the source holds."""
        while self.catch_up(_AT_ONCE):
            pass
        return StatsSnapshot(
            counts=tuple(
                RequestCount(cause, to, outcome, requests)
                for cause in Cause
                for to in PageState
                for outcome in Outcome
                if (requests := self._requests[id(cause), id(to), id(outcome)])
            ),
            pages_to_private=self._pages_to_private,
            pages_to_shared=self._pages_to_shared,
            waiting=self._waiting.snapshot(),
            applying=self._applying.snapshot(),
            discarding=self._discarding.snapshot(),
            total=self._total.snapshot(),
            hottest=self._hottest.top(HOTTEST_SHOWN),
            uncounted=self._uncounted,
            first_monotonic_ns=self._first_monotonic_ns,
            last_monotonic_ns=self._last_monotonic_ns,
        )
