import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
import structlog
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from kvmd import conversion_log
from kvmd.console_pump import DRAIN_SECONDS
from kvmd.conversion.messages import Outcome
from kvmd.conversion.ring import RecordRing
from kvmd.conversion_log import ConversionFileWriter, ConversionSampler, TokenBucket
from kvmd.nonblocking import NonBlockingWriter
from kvmd.ranges import PageState
from tests.conversion.records import RECORD


class Log:
    """A structlog logger whose events can be looked at."""

    def __init__(self) -> None:
        self._capture = structlog.testing.LogCapture()
        self.logger = structlog.wrap_logger(
            None, processors=[self._capture], wrapper_class=structlog.make_filtering_bound_logger(0)
        )

    @property
    def events(self) -> list[dict[str, Any]]:
        return [dict(entry) for entry in self._capture.entries]

    @property
    def names(self) -> list[str]:
        return [entry["event"] for entry in self._capture.entries]


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def ring() -> RecordRing:
    return RecordRing()


def fill(ring: RecordRing, count: int, **changes: Any) -> None:
    for _ in range(count):
        ring.append(msgspec.structs.replace(RECORD, sequence=ring.appended + 1, **changes))


def lines(text: bytes) -> list[dict[str, Any]]:
    assert not text or text.endswith(b"\n")
    return [json.loads(line) for line in text.splitlines()]


def accounted(events: list[dict[str, Any]]) -> int:
    """Return how many records the events stand for, after checking their order."""
    at = 0
    for event in events:
        if event["event"] == "conversions-lost":
            at += event["lost"]
        else:
            at += 1
            assert event["sequence"] == at
    return at


async def test_every_record_is_one_line_of_json(ring: RecordRing, log: Log, tmp_path: Path) -> None:
    path = tmp_path / "conversions"
    with NonBlockingWriter.of_path(path) as file:
        fill(ring, 5)
        writer = ConversionFileWriter(ring.reader(from_oldest=True), file, machine="m", log=log.logger)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.run)
            await wait_all_tasks_blocked()
            fill(ring, 100)
            writer.end()
    events = lines(path.read_bytes())
    assert [event["sequence"] for event in events] == list(range(1, 106))
    assert events[0]["event"] == "conversion"
    assert events[0]["machine"] == "m"
    assert next(iter(events[0])) == "event"
    assert log.names == []


async def test_records_are_written_as_they_come(
    ring: RecordRing,
    log: Log,
    tmp_path: Path,
    autojump_clock: MockClock,  # noqa: ARG001 - a clock that jumps
) -> None:
    path = tmp_path / "conversions"
    with NonBlockingWriter.of_path(path) as file:
        writer = ConversionFileWriter(ring.reader(), file, machine="m", log=log.logger)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.run)
            for count in range(1, 4):
                await trio.sleep(10)
                fill(ring, 1)
                await trio.sleep(1)
                assert len(lines(path.read_bytes())) == count
            writer.end()


async def test_what_a_slow_reader_loses_is_counted_in_the_stream(
    log: Log,
    tmp_path: Path,
    autojump_clock: MockClock,  # noqa: ARG001 - a clock that jumps
) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    ring = RecordRing(64)
    got = bytearray()
    with NonBlockingWriter.of_path(path) as file:
        reading = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        writer = ConversionFileWriter(ring.reader(), file, machine="m", log=log.logger)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.run)
            for _ in range(50):  # 2000 records are far more than the FIFO holds
                fill(ring, 40)
                await trio.sleep(1)
            while len(got) < 300_000:
                with trio.move_on_after(1) as scope:
                    await trio.lowlevel.wait_readable(reading)
                    got += os.read(reading, 65536)
                if scope.cancelled_caught:
                    break
            writer.end()
        got += os.read(reading, 1 << 20) if not got.endswith(b"\n") else b""
    os.close(reading)
    events = lines(bytes(got))
    assert accounted(events) == 2000
    assert sum(event.get("lost", 0) for event in events) > 1000
    assert log.names == []


@pytest.mark.parametrize("seconds_before_the_end", [0, 60])
async def test_the_end_waits_for_a_reader_but_not_for_ever(
    ring: RecordRing,
    log: Log,
    tmp_path: Path,
    seconds_before_the_end: int,
    autojump_clock: MockClock,  # noqa: ARG001 - a clock that jumps
) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    with NonBlockingWriter.of_path(path) as file:
        writer = ConversionFileWriter(ring.reader(), file, machine="m", log=log.logger)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.run)
            await wait_all_tasks_blocked()
            fill(ring, 5000)
            await trio.sleep(seconds_before_the_end)  # the writer waits for room meanwhile
            started = trio.current_time()
            writer.end()
        assert trio.current_time() - started == pytest.approx(DRAIN_SECONDS)
        reading = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        written = len(lines(os.read(reading, 1 << 20)))
        os.close(reading)
    assert log.names == ["conversions-unwritten"]
    at_most = log.events[0]["at_most"]
    assert 5000 - written <= at_most <= 5000 - written + conversion_log.BATCH


async def test_a_full_disk_is_said_once_and_what_it_cost_is_counted_when_there_is_room(
    ring: RecordRing,
    log: Log,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: MockClock,  # noqa: ARG001 - a clock that jumps
) -> None:
    path = tmp_path / "conversions"

    def no_room(_fd: int, _data: bytes) -> int:
        raise OSError(28, "No space left on device")

    with NonBlockingWriter.of_path(path) as file:
        writer = ConversionFileWriter(ring.reader(), file, machine="m", log=log.logger)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.run)
            fill(ring, 3)
            await trio.sleep(5)
            with monkeypatch.context() as patch:
                patch.setattr(os, "write", no_room)
                for _ in range(4):
                    fill(ring, 10)
                    await trio.sleep(5)
            fill(ring, 2)
            await trio.sleep(5)
            writer.end()
    events = lines(path.read_bytes())
    assert accounted(events) == 45
    assert [event["lost"] for event in events if event["event"] == "conversions-lost"] == [40]
    assert log.names == ["conversions-not-written"]
    assert log.events[0]["problem"] == "No space left on device"


async def test_a_disk_that_stays_full_is_told_to_the_log_at_the_end(
    ring: RecordRing,
    log: Log,
    autojump_clock: MockClock,  # noqa: ARG001 - a clock that jumps
) -> None:
    with NonBlockingWriter.of_path(Path("/dev/full")) as file:
        writer = ConversionFileWriter(ring.reader(), file, machine="m", log=log.logger)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.run)
            fill(ring, 30)
            await trio.sleep(5)
            writer.end()
    assert log.names == ["conversions-not-written", "conversions-unwritten"]
    assert log.events[1]["at_most"] == 30


async def test_a_reader_that_has_gone_ends_the_writing_but_not_the_guest(
    ring: RecordRing,
    log: Log,
    autojump_clock: MockClock,  # noqa: ARG001 - a clock that jumps
) -> None:
    reading, writing = os.pipe()
    with NonBlockingWriter.of_fd(writing) as file:
        writer = ConversionFileWriter(ring.reader(), file, machine="m", log=log.logger)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.run)
            fill(ring, 3)
            await trio.sleep(1)
            os.close(reading)
            fill(ring, 100)
            await trio.sleep(5)
            fill(ring, 100)
            await trio.sleep(5)
            writer.end()
    os.close(writing)
    assert log.names == ["conversions-not-written", "conversions-unwritten"]
    assert log.events[0]["consequence"] == "no more are written"
    assert log.events[1]["at_most"] == 200


async def test_a_writer_that_is_ended_before_it_runs_still_writes_what_there_is(
    ring: RecordRing, log: Log, tmp_path: Path
) -> None:
    path = tmp_path / "conversions"
    with NonBlockingWriter.of_path(path) as file:
        fill(ring, 3)
        writer = ConversionFileWriter(ring.reader(from_oldest=True), file, machine="m", log=log.logger)
        writer.end()
        await writer.run()
    assert len(lines(path.read_bytes())) == 3
    assert log.names == []


def test_a_token_bucket_holds_its_rate() -> None:
    now = [100.0]
    bucket = TokenBucket(10, lambda: now[0])
    assert [bucket.take() for _ in range(12)] == [True] * 10 + [False] * 2
    now[0] += 0.25
    assert [bucket.take() for _ in range(4)] == [True] * 2 + [False] * 2
    now[0] += 1000
    assert sum(bucket.take() for _ in range(100)) == 10


@pytest.fixture
def sampled(ring: RecordRing, log: Log) -> ConversionSampler:
    return ConversionSampler(ring.reader(), machine="m", log=log.logger)


async def test_few_conversions_are_all_shown_and_summed_up_each_second(
    sampled: ConversionSampler,
    ring: RecordRing,
    log: Log,
    autojump_clock: MockClock,  # noqa: ARG001 - a clock that jumps
) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sampled.run)
        for number in range(1, 31):
            fill(ring, 1)
            await trio.sleep(0.2)
            assert log.names.count("conversion") == number
        sampled.end()
    assert [event["sequence"] for event in log.events if event["event"] == "conversion"] == list(range(1, 31))
    assert "time" not in log.events[0]
    summaries = [event for event in log.events if event["event"] == "conversions"]
    assert 5 <= len(summaries) <= 7
    assert sum(event["shown"] for event in summaries) == sum(event["to_shared"] for event in summaries) == 30
    assert not any(event["suppressed"] for event in summaries)


async def test_many_conversions_are_shown_up_to_the_rate_and_summed_up_each_second(
    sampled: ConversionSampler,
    ring: RecordRing,
    log: Log,
    autojump_clock: MockClock,  # noqa: ARG001 - a clock that jumps
) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sampled.run)
        for _ in range(50):  # five seconds of 100 a second
            fill(ring, 4)
            fill(ring, 3, to=PageState.PRIVATE)
            fill(ring, 2, outcome=Outcome.SPURIOUS)
            fill(ring, 1, outcome=Outcome.STALE)
            await trio.sleep(0.1)
        sampled.end()
    summaries = [event for event in log.events if event["event"] == "conversions"]
    shown = log.names.count("conversion")
    assert 50 <= shown <= 65
    assert 5 <= len(summaries) <= 6
    assert sum(event["shown"] for event in summaries) == shown
    assert sum(event["shown"] + event["suppressed"] for event in summaries) == 500
    for key, count in (("to_shared", 200), ("to_private", 150), ("spurious", 100), ("stale", 50)):
        assert sum(event.get(key, 0) for event in summaries) == count


async def test_records_lost_before_they_were_looked_at_count_as_suppressed(
    log: Log,
    autojump_clock: MockClock,  # noqa: ARG001 - a clock that jumps
) -> None:
    ring = RecordRing(8)
    sampler = ConversionSampler(ring.reader(), machine="m", log=log.logger)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sampler.run)
        await wait_all_tasks_blocked()
        fill(ring, 100)
        await trio.sleep(3)
        sampler.end()
    (summary,) = [event for event in log.events if event["event"] == "conversions"]
    assert (summary["shown"], summary["suppressed"], summary["to_shared"]) == (8, 92, 8)


async def test_the_last_ones_are_shown_at_the_end(sampled: ConversionSampler, ring: RecordRing, log: Log) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sampled.run)
        await wait_all_tasks_blocked()
        fill(ring, 3)
        sampled.end()
    assert log.names == [*["conversion"] * 3, "conversions"]


async def test_the_last_second_is_summed_up_once(
    sampled: ConversionSampler,
    ring: RecordRing,
    log: Log,
    autojump_clock: MockClock,  # noqa: ARG001 - a clock that jumps
) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sampled.run)
        fill(ring, 3)
        await trio.sleep(0.2)
        fill(ring, 2)
        sampled.end()
    assert log.names == [*["conversion"] * 5, "conversions"]
    assert (log.events[-1]["to_shared"], log.events[-1]["shown"]) == (5, 5)


async def test_an_idle_sampler_says_nothing_and_wakes_for_nothing(
    sampled: ConversionSampler,
    log: Log,
    autojump_clock: MockClock,  # noqa: ARG001 - a clock that jumps
) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sampled.run)
        await trio.sleep(3600)
        sampled.end()
    assert log.names == []
