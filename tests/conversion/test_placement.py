"""Where the conversion service should be, by a clock of the test's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmd.conversion.placement import (
    ALONE,
    CROWD,
    GAIN,
    LONGEST_STAY,
    MOST_LONGER,
    SHORTEST_STAY,
    TRIAL_SHARE,
    WINDOW,
    Placement,
)

CPUS = 2
ELSEWHERE_US = 300
Costs = Callable[[bool], float]
"""Microseconds of a request, by whether it is made on the boot CPU."""


class Storm:
    """Requests that follow one another."""

    def __init__(self) -> None:
        self.placement = Placement(CPUS)
        self.now_ns = 1_000_000_000
        self.runnable = CPUS
        self.placement.look(self.now_ns, self.runnable)

    def windows(self, count: int, costs: Costs, vcpus: list[int] | None = None) -> str:
        """Make so many windows of requests, and tell where each was made: there, or elsewhere."""
        made = ""
        for _ in range(count):
            there = self.placement.on_boot_cpu
            made += "T" if there else "e"
            self.now_ns += int(WINDOW * costs(there) * 1000)
            self.placement.served(vcpus or [0] * WINDOW)
            self.placement.look(self.now_ns, self.runnable)
        return made


def there_takes(us: float) -> Costs:
    """Return the costs of a host where a request on the boot CPU takes so long."""
    return lambda there: us if there else ELSEWHERE_US


def test_it_goes_there_where_it_is_faster_and_looks_back_ever_more_rarely() -> None:
    storm = Storm()
    made = storm.windows(200, there_takes(ELSEWHERE_US * GAIN - 1))
    stays = [len(stay) for stay in made[1:].split("e")]
    assert made.startswith("eT")
    assert stays[:4] == [1 + SHORTEST_STAY, 2 * SHORTEST_STAY, 4 * SHORTEST_STAY, 8 * SHORTEST_STAY]


@pytest.mark.parametrize("us", [ELSEWHERE_US / 2, ELSEWHERE_US / 1.5, ELSEWHERE_US * 2, ELSEWHERE_US * 3])
def test_trials_cost_little_from_the_start(us: float) -> None:
    storm = Storm()
    better = min(us, ELSEWHERE_US)
    began_ns = storm.now_ns
    # The first window is elsewhere wherever it is better.
    storm.windows(2, there_takes(us))
    began_ns = storm.now_ns
    storm.windows(300, there_takes(us))
    assert storm.now_ns - began_ns <= 300 * WINDOW * better * 1000 * (1 + 1 / TRIAL_SHARE)


def test_a_window_in_which_the_host_was_busy_decides_nothing_for_long() -> None:
    storm = Storm()
    storm.windows(1, there_takes(150))
    assert storm.windows(1, there_takes(100 * ELSEWHERE_US)) == "T"
    later = storm.windows(MOST_LONGER * TRIAL_SHARE + 2, there_takes(150))
    assert later == "e" * MOST_LONGER * TRIAL_SHARE + "TT"


def test_it_stays_elsewhere_where_nothing_is_gained_and_tries_ever_more_rarely() -> None:
    storm = Storm()
    made = storm.windows(200, there_takes(ELSEWHERE_US * GAIN + 1))
    assert "TT" not in made
    assert [len(stay) for stay in made.split("T")][:5] == [1, 3, 6, 12, 24]


@pytest.mark.parametrize("us", [ELSEWHERE_US / 2, ELSEWHERE_US * 2])
def test_the_worse_place_costs_little_in_the_long_run(us: float) -> None:
    storm = Storm()
    storm.windows(8 * LONGEST_STAY, there_takes(us))
    made = storm.windows(4 * LONGEST_STAY, there_takes(us))
    assert made.count("e" if us < ELSEWHERE_US else "T") in (3, 4)


def test_it_leaves_at_once_when_the_boot_cpu_gets_crowded_and_goes_back_later() -> None:
    storm = Storm()
    storm.windows(1000, there_takes(150))
    assert storm.windows(1, there_takes(150)) == "T"
    assert storm.windows(3, there_takes(1000)) == "Tee"
    # It is known by trials alone that there is room again.
    assert "TT" in storm.windows(2 * SHORTEST_STAY + 2, there_takes(150))


def test_it_goes_back_at_once_when_elsewhere_gets_worse_than_what_is_known_of_there() -> None:
    storm = Storm()
    storm.windows(1000, there_takes(ELSEWHERE_US))
    assert storm.placement.on_boot_cpu is False
    worse: Costs = lambda there: ELSEWHERE_US if there else 2 * ELSEWHERE_US  # noqa: E731 - one line of its own type
    assert storm.windows(4, worse) == "eTTT"


def test_nobody_goes_there_while_more_wants_to_run_than_there_are_cpus_for() -> None:
    storm = Storm()
    storm.windows(20, there_takes(150))
    assert storm.placement.on_boot_cpu
    # A moment says nothing.
    storm.runnable = 4 * CROWD * CPUS
    assert storm.windows(1, there_takes(150)) == "T"
    storm.runnable = CPUS
    assert storm.windows(1, there_takes(150)) == "T"
    storm.runnable = CROWD * CPUS + 1
    storm.windows(100, there_takes(150))
    assert storm.windows(300, there_takes(150)) == "e" * 300
    storm.runnable = CPUS
    assert "TTT" in storm.windows(100, there_takes(150))


def test_what_is_broken_off_is_not_timed() -> None:
    storm = Storm()
    for _ in range(20):
        storm.placement.served([0] * (WINDOW - 1))
        storm.placement.break_off()
        storm.now_ns += 1
        storm.placement.look(storm.now_ns, CPUS)
    assert not storm.placement.on_boot_cpu
    assert storm.windows(2, there_takes(150)) == "eT"


def test_who_asks_alone_is_told_and_nobody_else() -> None:
    storm = Storm()
    few = WINDOW - round(WINDOW * ALONE) - 1
    storm.windows(1, there_takes(150), [3] * (WINDOW - few) + [1] * few)
    assert storm.placement.alone == 3
    storm.windows(1, there_takes(150), [3, 1] * (WINDOW // 2))
    assert storm.placement.alone is None


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 10**7), st.integers(0, 3)), max_size=400))
def test_it_takes_any_times_and_settles_for_the_better_place(steps: list[tuple[int, int, int]]) -> None:
    placement = Placement(CPUS)
    now_ns = 1
    for requests, elapsed_ns, vcpu in steps:
        now_ns += elapsed_ns
        placement.served([vcpu] * requests)
        if requests:
            placement.look(now_ns, CPUS)
        else:
            placement.break_off()
    storm = Storm()
    storm.placement, storm.now_ns = placement, now_ns
    placement.break_off()
    placement.look(now_ns, CPUS)
    storm.windows(4 * LONGEST_STAY, there_takes(150))
    assert storm.windows(2 * LONGEST_STAY, there_takes(150)).count("e") < LONGEST_STAY // 4
