"""Where the threads of a hand-off are while it is measured."""

import os

import pytest
import trio

from kvmd.benchmark import handoff
from kvmd.benchmark.handoff_ways import RARE_WAYS, Way

CPUS = sorted(os.sched_getaffinity(0))


class Noting(Way):
    """A way whose own thread notes where it answers."""

    noted: list[set[int]] = []  # noqa: RUF012 - of all of them

    def call(self) -> None:
        pass

    async def serve(self, *, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        await trio.to_thread.run_sync(self.note)

    def note(self) -> None:
        self.stay()
        self.noted.append(os.sched_getaffinity(0))


@pytest.mark.skipif(len(CPUS) < 2, reason="there is one CPU")
def test_the_answering_thread_is_on_its_cpu_whatever_it_did_before() -> None:
    first, last = frozenset(CPUS[:1]), frozenset(CPUS[-1:])
    for answering in (first, last, first, last):
        Noting.noted.clear()
        for _ in range(3):
            handoff._round(Noting, first, answering)
        assert Noting.noted == [answering] * 3
    assert os.sched_getaffinity(0) == set(CPUS)


@pytest.mark.parametrize("way", RARE_WAYS)
def test_hand_offs_with_pauses_are_as_many_as_were_said(way: type[Way], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handoff, "RARE_SECONDS", 0.0)
    home = frozenset(CPUS[:1])
    # What answers ends by itself after so many, and the service's way counts its records.
    assert handoff._rare_round(way, home, home) > 0
