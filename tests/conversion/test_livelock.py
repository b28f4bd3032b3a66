from __future__ import annotations

from collections.abc import Callable
from itertools import count

from kvmd.conversion import livelock
from kvmd.conversion.livelock import FIRST_SAMPLE, MOST_SPACING, SAMPLE_EVERY, STUCK_AFTER, LivelockWatch


class Guest:
    """Registers that the test sets, and a count of how often they were read."""

    def __init__(self) -> None:
        self.registers = 0
        self.reads = 0

    def read(self) -> int:
        self.reads += 1
        return self.registers


def faults_until_stuck(watch: LivelockWatch[int], most: int) -> int | None:
    """Fault up to ``most`` times; return the number of the fault that told the guest is stuck."""
    for number in range(1, most + 1):
        if watch.fault():
            return number
    return None


def reads_during(guest: Guest, faults: int, watch: LivelockWatch[int], move: Callable[[], None]) -> int:
    before = guest.reads
    for _ in range(faults):
        move()
        assert not watch.fault()
    return guest.reads - before


def test_an_instruction_that_never_completes_is_noticed() -> None:
    guest = Guest()
    watch = LivelockWatch(guest.read)
    # One sample, the next one SAMPLE_EVERY later, and then each fault until there are STUCK_AFTER equal ones.
    expected = FIRST_SAMPLE + SAMPLE_EVERY + STUCK_AFTER - 1
    assert faults_until_stuck(watch, 10**5) == expected
    assert guest.reads == STUCK_AFTER + 1


def test_a_guest_that_goes_on_after_each_fault_is_never_stuck() -> None:
    guest = Guest()
    watch = LivelockWatch(guest.read)
    numbers = count()

    def move() -> None:
        guest.registers = next(numbers)

    reads = reads_during(guest, 20_000, watch, move)
    assert reads <= 1 + (20_000 - FIRST_SAMPLE) // SAMPLE_EVERY


def test_any_other_exit_starts_the_count_anew_and_costs_nothing() -> None:
    guest = Guest()
    watch = LivelockWatch(guest.read)
    for _ in range(50):
        assert faults_until_stuck(watch, FIRST_SAMPLE - 1) is None
        watch.progress()
    assert guest.reads == 0
    assert faults_until_stuck(watch, FIRST_SAMPLE + SAMPLE_EVERY + STUCK_AFTER - 2) is None
    watch.progress()
    assert faults_until_stuck(watch, FIRST_SAMPLE + SAMPLE_EVERY + STUCK_AFTER - 2) is None
    assert watch.fault()


def test_a_single_change_in_time_is_progress() -> None:
    guest = Guest()
    watch = LivelockWatch(guest.read)
    assert faults_until_stuck(watch, FIRST_SAMPLE + SAMPLE_EVERY + STUCK_AFTER - 2) is None
    guest.registers += 1
    assert not watch.fault()
    again = faults_until_stuck(watch, 10**5)
    assert again is not None
    assert again >= STUCK_AFTER


def test_a_guest_that_only_looks_stuck_is_looked_at_less_and_less() -> None:
    guest = Guest()
    watch = LivelockWatch(guest.read)
    assert faults_until_stuck(watch, FIRST_SAMPLE) is None
    spacings = []
    for _ in range(12):
        # Equal registers for some faults, and then a change: contention, not a livelock.
        before = guest.reads
        faults = 0
        while guest.reads < before + 3:
            assert not watch.fault()
            faults += 1
        spacings.append(faults)
        guest.registers += 1
        assert not watch.fault()
    assert spacings == sorted(spacings)
    assert spacings[0] <= SAMPLE_EVERY + 3
    assert MOST_SPACING <= spacings[-1] <= MOST_SPACING + 3


def test_a_guest_that_was_slow_for_long_is_still_noticed_in_bounded_time() -> None:
    guest = Guest()
    watch = LivelockWatch(guest.read)
    watch._spacing = MOST_SPACING
    assert faults_until_stuck(watch, FIRST_SAMPLE + MOST_SPACING + STUCK_AFTER) is not None


def test_registers_that_differ_in_one_place_alone_differ() -> None:
    moments = count()
    watch: LivelockWatch[tuple[int, int]] = LivelockWatch(lambda: (0, next(moments)))
    assert not any(watch.fault() for _ in range(5 * STUCK_AFTER))


def test_the_numbers_leave_honest_contention_alone() -> None:
    # An instruction touches two pages of data and two of code at most; on losing against others it tries again.
    assert livelock.STUCK_AFTER >= 100 * 4
    assert livelock.SAMPLE_EVERY < livelock.FIRST_SAMPLE < livelock.MOST_SPACING
