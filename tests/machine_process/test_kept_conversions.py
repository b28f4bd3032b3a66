from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing

from kvmd.conversion.messages import Cause, Outcome
from kvmd.conversion.record import ConversionRecord
from kvmd.conversion.ring import RecordRing
from kvmd.machine_process.counting import counted
from kvmd.machine_process.folder import LAST_CONVERSIONS, LAST_RECORDS, LastConversions, MachineFolder
from kvmd.machine_process.kept_conversions import SEGMENT_BYTES, ConversionKeeper, conversions_left, settle_conversions
from kvmd.ranges import PageState
from kvmd.units import PAGE_SIZE


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[MachineFolder]:
    with MachineFolder.open(tmp_path) as opened:
        yield opened


def record(sequence: int, to: PageState = PageState.SHARED) -> ConversionRecord:
    return ConversionRecord(
        sequence=sequence,
        wall_ns=1_795_000_000_000_000_000 + sequence,
        monotonic_ns=5_741_600_515_777 + sequence,
        vcpu=3,
        cause=Cause.IMPLICIT,
        gpa=0x200000 + sequence * PAGE_SIZE,
        size_bytes=PAGE_SIZE,
        came_from=None if sequence % 2 else PageState.PRIVATE,
        to=to,
        outcome=Outcome.CONVERTED,
        merged=1,
        waiting_ns=314390,
        applying_ns=403479,
        discarding_ns=20082,
    )


def unexpected(error: OSError) -> None:
    pytest.fail(str(error))


def fill(ring: RecordRing, count: int) -> list[ConversionRecord]:
    records = [record(ring.appended + 1 + number) for number in range(count)]
    for each in records:
        ring.append(each)
    return records


def write(folder: MachineFolder, ring: RecordRing, *, segment_bytes: int = SEGMENT_BYTES) -> None:
    """Write all that the ring holds, and let go of the files as a process does that is killed."""
    keeper = ConversionKeeper(ring.reader(from_oldest=True), folder.fd, unexpected, segment_bytes=segment_bytes)
    keeper.end()
    trio.run(keeper.run)
    keeper.close()


def test_what_was_written_is_read_again(folder: MachineFolder) -> None:
    assert conversions_left(folder) is None
    ring = RecordRing()
    records = fill(ring, 1000)
    write(folder, ring)
    assert conversions_left(folder) == LastConversions(1000, records)


async def test_the_first_after_a_pause_is_written_at_once_and_the_next_20_ms_later(
    folder: MachineFolder, autojump_clock: trio.testing.MockClock
) -> None:
    assert autojump_clock.autojump_threshold == 0
    ring = RecordRing()
    keeper = ConversionKeeper(ring.reader(), folder.fd, unexpected)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keeper.run)
        await trio.sleep(1)
        first = fill(ring, 1)
        await trio.testing.wait_all_tasks_blocked()
        assert conversions_left(folder) == LastConversions(1, first)
        second = fill(ring, 3)
        await trio.testing.wait_all_tasks_blocked()
        assert conversions_left(folder) == LastConversions(1, first)
        await trio.sleep(0.021)
        assert conversions_left(folder) == LastConversions(4, first + second)
        keeper.end()
    keeper.close()


def test_the_last_ones_are_kept_in_two_files_of_bounded_size(folder: MachineFolder, tmp_path: Path) -> None:
    ring = RecordRing()
    fill(ring, 3 * LAST_RECORDS)
    write(folder, ring)
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert len(sizes) == 2
    assert max(sizes) < SEGMENT_BYTES + (1 << 16)
    left = conversions_left(folder)
    assert left is not None
    assert left.count == 3 * LAST_RECORDS
    assert [each.sequence for each in left.records] == list(range(2 * LAST_RECORDS + 1, 3 * LAST_RECORDS + 1))


def test_half_a_frame_at_the_end_and_garbage_are_passed_over(folder: MachineFolder, tmp_path: Path) -> None:
    ring = RecordRing()
    records = fill(ring, 600)
    write(folder, ring)
    (path,) = tmp_path.iterdir()
    data = path.read_bytes()
    for broken, count in (
        (data[:-1], 512),
        (data[:3], 0),
        (data + b"\0\0\0\3abc", 600),
        (data + b"\xff\xff\xff\xff", 600),
        (data + data, 600),
        (b"\0\0\0\1\x92" + data, 0),
        (b"", 0),
    ):
        path.write_bytes(broken)
        assert conversions_left(folder) == (LastConversions(count, records[:count]) if count else None)


def test_another_life_starts_anew(folder: MachineFolder, tmp_path: Path) -> None:
    ring = RecordRing()
    fill(ring, 10)
    write(folder, ring)
    ConversionKeeper(ring.reader(), folder.fd, unexpected).close()
    assert list(tmp_path.iterdir()) == []


def test_what_an_end_in_order_has_written_counts_and_the_rest_is_deleted(folder: MachineFolder, tmp_path: Path) -> None:
    ring = RecordRing()
    records = fill(ring, 10)
    write(folder, ring)
    keeper = ConversionKeeper(ring.reader(), folder.fd, unexpected)
    folder.write(LAST_CONVERSIONS, LastConversions(12, records[:2]))
    keeper.discard()
    assert [path.name for path in tmp_path.iterdir()] == [LAST_CONVERSIONS]
    assert conversions_left(folder) == LastConversions(12, records[:2])


def test_what_a_violent_end_left_is_settled_once(folder: MachineFolder, tmp_path: Path) -> None:
    assert settle_conversions(folder) is None
    ring = RecordRing()
    left = LastConversions(600, fill(ring, 600))
    write(folder, ring)
    for _ in range(2):
        assert settle_conversions(folder) == left
        assert [path.name for path in tmp_path.iterdir()] == [LAST_CONVERSIONS]
    assert conversions_left(folder) == left


def test_what_cannot_be_settled_stays(folder: MachineFolder, tmp_path: Path) -> None:
    ring = RecordRing()
    left = LastConversions(10, fill(ring, 10))
    write(folder, ring)
    (tmp_path / f"{LAST_CONVERSIONS}.new").mkdir()
    with pytest.raises(OSError, match="Is a directory"):
        settle_conversions(folder)
    assert conversions_left(folder) == left


def test_a_disk_that_is_full_is_told_once_and_leaves_a_gap(
    folder: MachineFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    ring = RecordRing()
    records = fill(ring, 1024)
    problems: list[OSError] = []
    keeper = ConversionKeeper(ring.reader(from_oldest=True), folder.fd, problems.append)
    keeper.end()
    written, real = 0, os.write

    def full(fd: int, data: bytes) -> int:
        nonlocal written
        written += 1
        if written in {2, 3}:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data)

    monkeypatch.setattr(os, "write", full)
    trio.run(keeper.run)
    keeper.close()
    assert [problem.errno for problem in problems] == [errno.ENOSPC]
    assert conversions_left(folder) == LastConversions(1024, records[:256] + records[768:])


def test_counters_of_a_machine_that_did_not_say_them() -> None:
    values = counted(LastConversions(10, [record(number) for number in (8, 9, 10)]))
    assert values.requests == [("implicit", "shared", "converted", 3)]
    assert values.lost == 7
    assert values.waiting_us[3] == pytest.approx(314.39, rel=0.01)
    assert msgspec.json.decode(msgspec.json.encode(values))["hottest"]
