"""Conversions as they happen: all of them to a file, a sample of them to the log."""

from __future__ import annotations

import errno
import math
from collections import Counter
from collections.abc import Callable

import structlog
import trio

from kvmd.console_pump import DRAIN_SECONDS
from kvmd.conversion.messages import Outcome
from kvmd.conversion.record import ConversionRecord
from kvmd.conversion.ring import RecordReader
from kvmd.log import conversion_event, render_json
from kvmd.nonblocking import NonBlockingWriter

BATCH = 16
"""Records made into lines before other tasks of the event loop have their turn: a fraction of a millisecond."""

GATHER_SECONDS = 0.02
"""How long records gather after a write: a task switch for each would cost the guest more than the lines do."""

RETRY_SECONDS = 1.0
"""How long a file that could not be written is left alone."""

SHOWN_A_SECOND = 10
"""Conversions that the log shows each second, and at once after a pause."""

SUMMARY_SECONDS = 1.0


class RecordFollower:
    """A task that follows a ring until ``end`` is called: waits for records, then lets some more gather."""

    def __init__(self, reader: RecordReader) -> None:
        self._reader = reader
        self._ended = trio.Event()
        self._woken = trio.Event()

    def end(self) -> None:
        """Make ``run`` return once it has dealt with all records up to now."""
        self._ended.set()
        self._woken.set()

    async def _wait_for_records(self, seconds: float = math.inf) -> None:
        """Return when something is unread, ``end`` was called, or ``seconds`` (0 or less: at once) have passed."""
        if not self._ended.is_set():
            self._woken = trio.Event()
        wake = self._woken.set
        self._reader.wake_once(wake)
        try:
            with trio.move_on_after(max(0.0, seconds)):
                await self._woken.wait()
        finally:
            self._reader.forget(wake)

    async def _gather(self, seconds: float) -> None:
        with trio.move_on_after(seconds):
            await self._ended.wait()


class _Lines:
    """A logger, as structlog wants one, that gathers lines for one write."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def info(self, line: bytes) -> None:
        """Add one line."""
        self._bytes += line
        self._bytes += b"\n"

    def take(self) -> bytes:
        """Return what was gathered."""
        taken = bytes(self._bytes)
        self._bytes.clear()
        return taken


class ConversionFileWriter(RecordFollower):
    """Writes every conversion to a file as one line of JSON, and what it was too slow for as ``conversions-lost``.

    The file's reader never slows a guest: records that the ring has dropped are counted in the stream itself, in
    the place where they are missing. So are those of a disk that was full.

    Args:
        reader: where the records come from.
        writer: where the lines go; closed by its owner.
        machine: the machine's name.
        log: told, once of each kind, of what went wrong.
    """

    def __init__(
        self,
        reader: RecordReader,
        writer: NonBlockingWriter,
        *,
        machine: str,
        log: structlog.typing.FilteringBoundLogger,
    ) -> None:
        super().__init__(reader)
        self._writer = writer
        self._machine = machine
        self._log = log
        self._lines = _Lines()
        self._event = structlog.wrap_logger(
            self._lines,
            processors=[render_json],
            wrapper_class=structlog.make_filtering_bound_logger(0),
        ).info
        self._scope = trio.CancelScope()
        self._lost = 0
        self._unwritten = 0
        self._said: set[int | None] = set()
        self._gone = False

    async def run(self) -> None:
        """Write until ``end`` was called and all is written, or ``DRAIN_SECONDS`` have passed since."""
        with self._scope:
            while not self._ended.is_set():
                await self._wait_for_records()
                written = await self._write_unread()
                await self._gather(GATHER_SECONDS if written else RETRY_SECONDS)
            await self._write_unread()
        unwritten = self._reader.unread + self._unwritten + self._lost
        if unwritten:
            self._log.warning("conversions-unwritten", at_most=unwritten)

    def end(self) -> None:
        """Make ``run`` return once all is written, at the latest after ``DRAIN_SECONDS``."""
        self._scope.deadline = trio.current_time() + DRAIN_SECONDS
        super().end()

    async def _write_unread(self) -> bool:
        """Write what is unread now; return false where the file did not take it."""
        while self._reader.unread or (self._lost and not self._gone):
            lost, records = self._reader.take(BATCH)
            self._lost += lost
            if self._gone:
                self._lost += len(records)
                await trio.lowlevel.checkpoint()
                continue
            if self._lost:
                self._event("conversions-lost", machine=self._machine, lost=self._lost)
            for record in records:
                self._event("conversion", **conversion_event(record, self._machine))
            self._unwritten = len(records)
            try:
                await self._writer.write(self._lines.take())
            except OSError as error:
                self._lost += len(records)
                self._unwritten = 0
                self._say(error)
                return False
            self._lost = 0
            self._unwritten = 0
        return True

    def _say(self, error: OSError) -> None:
        """Tell the log, once for each kind of error, and give up where there is no reader any more."""
        self._gone = error.errno in {errno.EPIPE, errno.EIO}
        if error.errno not in self._said:
            self._said.add(error.errno)
            self._log.warning(
                "conversions-not-written",
                problem=error.strerror,
                consequence="no more are written" if self._gone else "counted as lost until there is room",
            )


class TokenBucket:
    """Lets ``rate`` events a second through, and as many at once after a pause.

    Args:
        rate: events a second.
        clock: seconds, never going back.
    """

    def __init__(self, rate: int, clock: Callable[[], float]) -> None:
        self._rate = rate
        self._clock = clock
        self._tokens = float(rate)
        self._filled_at = clock()

    def take(self) -> bool:
        """Tell whether one more event may pass now."""
        now = self._clock()
        self._tokens = min(self._rate, self._tokens + (now - self._filled_at) * self._rate)
        self._filled_at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


class ConversionSampler(RecordFollower):
    """Logs conversions as they happen up to ``SHOWN_A_SECOND``, and sums up each second that had any.

    A summary is an event ``conversions``: the requests of about a second by direction and outcome, how many of
    them were shown, and how many were not. So the summaries alone add up to all that there was.

    Args:
        reader: where the records come from.
        machine: the machine's name.
        log: where they go.
    """

    def __init__(self, reader: RecordReader, *, machine: str, log: structlog.typing.FilteringBoundLogger) -> None:
        super().__init__(reader)
        self._machine = machine
        self._log = log
        self._counts: Counter[str] = Counter()
        self._shown = 0
        self._suppressed = 0

    async def run(self) -> None:
        """Log until ``end`` was called."""
        bucket = TokenBucket(SHOWN_A_SECOND, trio.current_time)
        while not self._ended.is_set():
            await self._wait_for_records()
            summary_at = trio.current_time() + SUMMARY_SECONDS
            while not self._ended.is_set() and trio.current_time() < summary_at:
                await self._log_unread(bucket)
                # No more than one look in 20 ms, however many there are.
                await self._gather(GATHER_SECONDS)
                await self._wait_for_records(summary_at - trio.current_time())
            if not self._ended.is_set():
                self._sum_up()
        # At the end the last records belong to the last second, which is summed up once.
        await self._log_unread(bucket)
        self._sum_up()

    async def _log_unread(self, bucket: TokenBucket) -> None:
        while self._reader.unread:
            lost, records = self._reader.take(16 * BATCH)
            self._suppressed += lost
            for record in records:
                self._count(record)
                if bucket.take():
                    self._show(record)
                else:
                    self._suppressed += 1
            await trio.lowlevel.checkpoint()

    def _count(self, record: ConversionRecord) -> None:
        if record.outcome is Outcome.CONVERTED:
            self._counts[f"to_{record.to.value}"] += 1
        else:
            self._counts[record.outcome.value] += 1

    def _show(self, record: ConversionRecord) -> None:
        self._shown += 1
        fields = conversion_event(record, self._machine)
        # The line has a time of its own; the exact one is in the file.
        del fields["time"], fields["monotonic_ns"]
        self._log.info("conversion", **fields)

    def _sum_up(self) -> None:
        if self._shown or self._suppressed:
            self._log.info(
                "conversions", machine=self._machine, **self._counts, shown=self._shown, suppressed=self._suppressed
            )
        self._counts.clear()
        self._shown = self._suppressed = 0
