from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmd.machine_process.lifecycle import KEPT, LifecycleEvent, LifecycleLog
from kvmd.machine_process.steps import Steps, read_steps


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def unexpected(error: OSError) -> None:
    pytest.fail(str(error))


def event(number: int) -> LifecycleEvent:
    return LifecycleEvent(number=number, wall_ns=number * 10, change="paused", state="paused")


def test_steps_are_numbered_and_read_again(folder: int) -> None:
    steps = Steps(folder, unexpected)
    steps.tell("created", "created")
    steps.tell("started", "running")
    assert not steps.ended
    steps.close()
    again = Steps(folder, unexpected)
    again.tell("stopped", "stopped", reason="guest-exit", message="ended", status=3)
    again.close()
    assert again.ended
    found = read_steps(folder)
    assert [(step.number, step.change) for step in found] == [(1, "created"), (2, "started"), (3, "stopped")]
    assert (found[-1].reason, found[-1].status, found[-1].signal) == ("guest-exit", 3, None)


def test_half_a_line_is_passed_over(folder: int, tmp_path: Path) -> None:
    steps = Steps(folder, unexpected)
    for _ in range(3):
        steps.tell("paused", "paused")
    steps.close()
    (path,) = tmp_path.glob("lifecycle-*")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:20] + b"\n" + lines[2] + b'{"number":4')
    # What lies before a gap is no use: numbers go on without one.
    assert [step.number for step in read_steps(folder)] == [3]


def test_a_reader_is_told_what_it_missed() -> None:
    log = LifecycleLog()
    assert log.after(0) == (0, [])
    for number in range(1, KEPT + 11):
        log.append(event(number))
    lost, found = log.after(4)
    assert (lost, found[0].number, len(found)) == (6, 11, KEPT)
    assert log.after(KEPT + 10) == (0, [])
    assert log.after(KEPT + 8, until_ns=(KEPT + 9) * 10) == (0, [event(KEPT + 9)])


def test_a_number_that_does_not_follow_is_a_bug() -> None:
    log = LifecycleLog()
    log.append(event(5))
    with pytest.raises(ValueError, match="does not follow"):
        log.append(event(7))
