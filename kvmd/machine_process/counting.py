"""What a machine did, as its process says it, and as what it left says it where that could not."""

from __future__ import annotations

from kvmd.conversion.stats import ConversionStats, StatsSnapshot
from kvmd.machine_process.folder import LastConversions
from kvmd.machine_process.messages import Balloon, CounterValues


def counter_values(
    snapshot: StatsSnapshot,
    *,
    shared_bytes: int,
    private_bytes: int,
    lost: int = 0,
    balloon: Balloon | None = None,
    held_back_us: int = 0,
) -> CounterValues:
    """Return the counters of a machine of so much shared and private memory; ``lost`` beside what the snapshot lost."""
    waiting, applying, discarding = (
        (part.p50, part.p90, part.p99, part.maximum)
        for part in (snapshot.waiting, snapshot.applying, snapshot.discarding)
    )
    return CounterValues(
        requests=[
            (count.cause.value, count.to.value, count.outcome.value, count.requests) for count in snapshot.counts
        ],
        shared_bytes=shared_bytes,
        private_bytes=private_bytes,
        waiting_us=waiting,
        applying_us=applying,
        discarding_us=discarding,
        lost=snapshot.uncounted + lost,
        hottest=[(hot.gpa, hot.size_bytes, hot.count, hot.overcount) for hot in snapshot.hottest],
        balloon=balloon,
        held_back_us=held_back_us,
    )


def counted(left: LastConversions) -> CounterValues:
    """Return the counters of a machine that ended without a word: of the records that are left, the others as lost.

    Nobody knows how much of its memory was shared: 0 stands for that.
    """
    stats = ConversionStats()
    for record in left.records:
        stats.add(record)
    lost = left.count - len(left.records)
    return counter_values(stats.snapshot(), shared_bytes=0, private_bytes=0, lost=lost)
