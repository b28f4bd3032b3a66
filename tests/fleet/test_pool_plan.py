from __future__ import annotations

from kvmd.fleet.pool_plan import PoolPlan


def starts(plan: PoolPlan) -> list[int]:
    """Start as many units as the plan wants."""
    found = []
    while (number := plan.start_one(spares=True)) is not None:
        found.append(number)
    return found


def test_as_many_are_started_as_are_to_wait() -> None:
    plan = PoolPlan(3, most_starting=10)
    assert starts(plan) == [1, 2, 3]
    assert starts(plan) == []


def test_no_more_start_at_a_time_than_help() -> None:
    plan = PoolPlan(5, most_starting=2)
    assert starts(plan) == [1, 2]
    assert plan.came(1)
    assert starts(plan) == [3]


def test_one_that_is_taken_is_replaced_and_its_number_used_again_once_it_is_free() -> None:
    plan = PoolPlan(1, most_starting=2)
    assert starts(plan) == [1]
    assert plan.take() is None
    assert plan.came(1)
    assert plan.take() == 1
    assert starts(plan) == [2]
    plan.came(2)
    plan.free(1)
    assert plan.take() == 2
    assert starts(plan) == [1]


def test_without_spare_ones_they_are_started_for_who_asks() -> None:
    plan = PoolPlan(0, most_starting=2)
    assert starts(plan) == []
    plan.ask()
    assert starts(plan) == [1]
    plan.came(1)
    assert plan.take() == 1
    plan.give_up()
    assert starts(plan) == []


def test_one_that_was_not_asked_for_is_not_taken_in() -> None:
    plan = PoolPlan(1, most_starting=2)
    assert not plan.came(7)
    assert plan.take() is None


def test_after_a_failure_only_who_asks_makes_another_start_until_it_is_free() -> None:
    plan = PoolPlan(1, most_starting=2)
    assert starts(plan) == [1]
    plan.lost(1)
    assert starts(plan) == []
    plan.ask()
    assert starts(plan) == [2]
    plan.give_up()
    plan.free(1)
    assert starts(plan) == []  # 2 is on its way
    plan.lost(2)
    plan.free(2)
    assert starts(plan) == [1]


def test_numbers_in_use_are_left_alone() -> None:
    plan = PoolPlan(2, most_starting=4)
    assert plan.use(1)
    assert not plan.use(1)
    assert starts(plan) == [2, 3]


def test_with_fewer_spare_ones_the_last_to_come_goes() -> None:
    plan = PoolPlan(2, most_starting=4)
    assert starts(plan) == [1, 2]
    plan.came(1)
    plan.came(2)
    assert plan.surplus() is None
    plan.spare = 1
    assert plan.surplus() == 2
    assert plan.surplus() is None
    assert plan.waiting == 1


def test_spares_can_wait_and_those_that_are_asked_for_cannot() -> None:
    plan = PoolPlan(2, most_starting=4)
    assert plan.start_one(spares=False) is None
    plan.ask()
    assert plan.start_one(spares=False) == 1
    assert plan.start_one(spares=False) is None
    # Nor do spares take the processors from the one that somebody waits for.
    assert plan.start_one(spares=True) is None
    assert plan.came(1)
    assert [plan.start_one(spares=True) for _ in range(3)] == [2, 3, None]
    assert plan.take() == 1
    plan.give_up()
    plan.ask()
    # Two are on their way already.
    assert plan.start_one(spares=False) is None
