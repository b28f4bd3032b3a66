from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvmd.machine_process.segments import SegmentWriter, read_segments, segments_of


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


@contextmanager
def full_disk(left_bytes: int) -> Iterator[None]:
    """Let no file grow beyond some bytes. Not for a fixture: the limit holds for what pytest writes, too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (left_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def read_all(folder: int, offset: int = 0, limit: int = 7) -> tuple[bytes, int]:
    """Return everything from ``offset`` on, and how much of it is gone."""
    data, dropped = b"", 0
    while (piece := read_segments(folder, "console", offset, limit)).data:
        data += piece.data
        dropped += piece.dropped
        offset = piece.end
    return data, dropped


def test_an_output_goes_on_over_segments_and_the_oldest_go(folder: int) -> None:
    writer = SegmentWriter(folder, "console", segment_bytes=16, kept=2)
    whole = bytes(range(100))
    for at in range(0, 100, 5):
        writer.append(whole[at : at + 5])
    writer.close()
    kept = segments_of(folder, "console")
    assert len(kept) == 2
    data, dropped = read_all(folder)
    assert data == whole[dropped:]
    assert dropped == kept[0][0]
    assert read_all(folder, 97) == (whole[97:], 0)
    assert read_all(folder, 100) == (b"", 0)


def test_a_later_writer_goes_on_where_the_first_stopped(folder: int) -> None:
    for text in (b"one", b"two"):
        writer = SegmentWriter(folder, "console")
        writer.append(text)
        writer.close()
    assert writer.end == 6
    assert read_all(folder) == (b"onetwo", 0)


def test_a_full_disk_leaves_a_gap_and_the_rest_goes_on(folder: int) -> None:
    writer = SegmentWriter(folder, "console", kept=8)
    with full_disk(64):
        with pytest.raises(OSError, match="File too large"):
            writer.append(b"x" * 100)
        assert writer.unwritten == 36
        writer.append(b"after")
    writer.close()
    assert read_all(folder, limit=1000) == (b"x" * 64 + b"after", 36)


def test_a_disk_that_takes_nothing_costs_no_older_segment(folder: int) -> None:
    writer = SegmentWriter(folder, "console", segment_bytes=4, kept=2)
    writer.append(b"12345678")
    with full_disk(0):
        for _ in range(4):
            with pytest.raises(OSError, match="File too large"):
                writer.append(b"nothing")
    writer.close()
    assert read_all(folder) == (b"12345678", 0)
    assert writer.unwritten == 28


def test_other_files_are_no_segments(folder: int, tmp_path: Path) -> None:
    for name in ("console", "console-", "console-1", "console-x" * 3, "log-00000000000000000000", "-"):
        (tmp_path / name).write_text("x")
    assert segments_of(folder, "console") == []
