"""A thread's stays on the boot CPU."""

from __future__ import annotations

import os
import threading

import pytest

from kvmd.boot_cpu import BOOT_CPU, BootCpuStay
from tests.affinity import Affinities

THREAD = 77


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Affinities:
    made = Affinities()
    made.install(monkeypatch)
    return made


def test_a_stay_ends_where_it_began(table: Affinities) -> None:
    table.masks[THREAD] = {0, 2, 5}
    stay = BootCpuStay(THREAD)
    for _ in range(2):
        assert stay.begin()
        assert stay.begin()
        assert table.masks[THREAD] == {BOOT_CPU}
        stay.end()
        stay.end()
        assert table.masks[THREAD] == {0, 2, 5}
    assert len(table.calls) == 4, "begun or ended twice, it asks the kernel once"


@pytest.mark.parametrize("allowed", [{1, 2}, {0}, {3}])
def test_who_is_kept_off_or_has_no_choice_is_left_alone(table: Affinities, allowed: set[int]) -> None:
    table.masks[THREAD] = allowed
    stay = BootCpuStay(THREAD)
    assert not stay.begin()
    stay.end()
    assert table.calls == []


def test_what_the_operator_says_meanwhile_stands(table: Affinities) -> None:
    table.masks[THREAD] = {0, 1}
    stay = BootCpuStay(THREAD)
    assert stay.begin()
    table.masks[THREAD] = {1}
    stay.end()
    assert table.masks[THREAD] == {1}
    assert not stay.begin()


def test_a_host_that_forbids_it_is_no_failure(table: Affinities) -> None:
    table.masks[THREAD] = {0, 1}
    table.refuse = True
    stay = BootCpuStay(THREAD)
    assert not stay.begin()
    table.refuse = False
    assert stay.begin()
    table.refuse = True
    stay.end()
    assert not BootCpuStay(THREAD + 1).begin(), "a thread that is gone"


def test_a_thread_of_this_host() -> None:
    seen: list[set[int]] = []

    def stay_once() -> None:
        stay = BootCpuStay()
        seen.append(os.sched_getaffinity(0))
        stay.begin()
        seen.append(os.sched_getaffinity(0))
        stay.end()
        seen.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=stay_once)
    thread.start()
    thread.join()
    before, there, after = seen
    assert there == ({BOOT_CPU} if BOOT_CPU in before else before)
    assert after == before == os.sched_getaffinity(0)
