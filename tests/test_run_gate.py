"""The gate, with vCPUs of the test's own in real threads. Nothing here sleeps: every step is waited for."""

from __future__ import annotations

import itertools
import random
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import cast

import pytest

from kvmd import run_gate
from kvmd.hv.vcpu import Vcpu
from kvmd.run_gate import RunGate, Seat, VcpuStuck

WATCHDOG_SECONDS = 20.0
"""Only a test that fails waits this long."""

KICKED, IO, END = "kicked", "io", "end"


class WatchedCondition(threading.Condition):
    """A condition that tells when somebody waits on it."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = 0
        self._seen = threading.Condition()

    def wait(self, timeout: float | None = None) -> bool:
        # The caller holds this condition's lock until it waits, so whoever gets the lock next finds it waiting.
        with self._seen:
            self.waits += 1
            self._seen.notify_all()
        return super().wait(timeout)

    def await_waits(self, number: int) -> None:
        """Block until ``wait`` was called ``number`` times, and the last caller does wait."""
        with self._seen:
            assert self._seen.wait_for(lambda: self.waits >= number, WATCHDOG_SECONDS)
        with self:
            pass


class FakeVcpu:
    """A guest that runs until it is kicked, or makes the exits that the test gives it.

    As in KVM, a run first completes pending I/O, and then leaves at once where an exit was requested.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self.running = False
        self.entries = 0
        self.kicks = 0
        self.pending = False
        self.completed = 0
        self.deaf = False
        self.exits_after_completion: deque[str] = deque()
        self._exits: deque[str] = deque()
        self._requested = False
        self._changed = threading.Condition()

    def run(self) -> str:
        with self._changed:
            self.running = True
            self.entries += 1
            if self.pending:
                self.pending = False
                self.completed += 1
                if self.exits_after_completion:
                    self.running = False
                    return self._leave(self.exits_after_completion.popleft())
            self._changed.notify_all()
            assert self._changed.wait_for(
                lambda: bool(self._exits) or (self._requested and not self.deaf), WATCHDOG_SECONDS
            )
            self.running = False
            return self._leave(KICKED if self._requested and not self.deaf else self._exits.popleft())

    def _leave(self, exit_: str) -> str:
        self.pending = exit_ == IO
        self._changed.notify_all()
        return exit_

    def request_exit(self) -> None:
        with self._changed:
            self._requested = True
            self.kicks += 1
            self._changed.notify_all()

    def clear_exit_request(self) -> None:
        self._requested = False

    def make(self, exit_: str) -> None:
        with self._changed:
            self._exits.append(exit_)
            self._changed.notify_all()

    def hear_again(self) -> None:
        with self._changed:
            self.deaf = False
            self._changed.notify_all()

    def await_entry(self, number: int) -> None:
        """Block until the guest was entered ``number`` times and runs."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.running and self.entries >= number, WATCHDOG_SECONDS)


class Runner:
    """A vCPU thread, with the loop of ``kvmd.vcpu_tasks``.

    An I/O exit is handled only once the test says so.
    """

    def __init__(self, gate: RunGate, vcpu: FakeVcpu) -> None:
        self.gate, self.vcpu = gate, vcpu
        # The gate uses a vCPU's index and its kick, and no more.
        self.seat: Seat = gate.join(cast("Vcpu", vcpu))
        self.handling = threading.Event()
        self.handled = threading.Semaphore(0)
        self.failure: BaseException | None = None
        self.thread = threading.Thread(target=self._main, name=f"vcpu {vcpu.index}")

    def _main(self) -> None:
        try:
            self._loop()
        except BaseException as error:  # noqa: BLE001  shown by the test's own thread
            self.failure = error
        finally:
            self.gate.leave(self.seat)

    def _loop(self) -> None:
        gate, seat, vcpu = self.gate, self.seat, self.vcpu
        completing = False
        while True:
            seat.inside = True
            if gate.hold:
                seat.inside = False
                gate.went_out()
                if gate.stopping:
                    return
                if not gate.wait(seat, completing=completing):
                    continue
                vcpu.request_exit()
            exit_ = vcpu.run()
            seat.inside = False
            if gate.hold:
                gate.went_out()
            completing = exit_ == IO
            if exit_ == KICKED:
                vcpu.clear_exit_request()
            elif exit_ == IO:
                self.handle_io()
            elif exit_ == END:
                return

    def handle_io(self) -> None:
        self.handling.set()
        assert self.handled.acquire(timeout=WATCHDOG_SECONDS)

    def join(self) -> None:
        self.thread.join(WATCHDOG_SECONDS)
        assert not self.thread.is_alive()
        if self.failure is not None:
            raise self.failure


class Rig:
    def __init__(self) -> None:
        self.parked = threading.Semaphore(0)
        self.gate = RunGate(self.parked.release)
        self.condition = WatchedCondition()
        self.gate._changed = self.condition
        self.runners: list[Runner] = []

    @property
    def vcpus(self) -> list[FakeVcpu]:
        return [runner.vcpu for runner in self.runners]

    def start(self, count: int) -> list[FakeVcpu]:
        """Start vCPUs, and wait until all of them run."""
        self.runners = [Runner(self.gate, FakeVcpu(index)) for index in range(count)]
        for runner in self.runners:
            runner.thread.start()
        for vcpu in self.vcpus:
            vcpu.await_entry(1)
        return self.vcpus

    def await_parked(self) -> None:
        assert self.parked.acquire(timeout=WATCHDOG_SECONDS)

    def is_parked(self) -> bool:
        return self.parked.acquire(blocking=False)

    def in_io(self, index: int) -> Runner:
        """Bring one vCPU into the handling of an I/O exit."""
        runner = self.runners[index]
        runner.vcpu.make(IO)
        assert runner.handling.wait(WATCHDOG_SECONDS)
        return runner

    def end(self) -> None:
        """Stop all threads, in whatever state they are."""
        self.gate.stop()
        for runner in self.runners:
            runner.vcpu.hear_again()
            runner.handled.release(1000)
        for runner in self.runners:
            runner.join()


@pytest.fixture
def rig() -> Iterator[Rig]:
    found = Rig()
    yield found
    found.end()


# -- holding back ----------------------------------------------------------------------------------------------

LATER_NS = 1 << 62
"""Beyond the end of any test."""


def hold_back(rig: Rig, until_ns: int) -> tuple[threading.Thread, list[bool]]:
    """Hold a thread back, and return it and where it puts what it was told."""
    told: list[bool] = []
    thread = threading.Thread(target=lambda: told.append(rig.gate.hold_back(until_ns)))
    thread.start()
    return thread, told


def test_who_is_held_back_goes_on_when_its_time_has_come(rig: Rig) -> None:
    assert rig.gate.hold_back(time.monotonic_ns())
    assert rig.condition.waits == 0
    for milliseconds in (2, 20, 200, 2000):  # on a busy machine its time may come before it is held back
        until_ns = time.monotonic_ns() + milliseconds * 1_000_000
        assert rig.gate.hold_back(until_ns)
        assert time.monotonic_ns() >= until_ns
        if rig.gate.held_back_ns:
            break
    assert rig.gate.held_back_ns > 0


@pytest.mark.parametrize("command", [RunGate.pause, RunGate.stop])
def test_a_pause_or_a_stop_comes_before_its_time(rig: Rig, command: Callable[[RunGate], None]) -> None:
    thread, told = hold_back(rig, LATER_NS)
    rig.condition.await_waits(1)
    command(rig.gate)
    thread.join(WATCHDOG_SECONDS)
    assert told == [False]
    # As long as that lasts, nobody is held back anew.
    assert not rig.gate.hold_back(LATER_NS)


def test_a_moment_in_which_all_are_out_does_not_shorten_it(rig: Rig) -> None:
    thread, told = hold_back(rig, LATER_NS)
    rig.condition.await_waits(1)
    with rig.gate.quiesce():
        pass
    rig.condition.await_waits(2)
    assert not told
    rig.gate.stop()
    thread.join(WATCHDOG_SECONDS)
    assert told == [False]


# -- quiesce -------------------------------------------------------------------------------------------------


def test_no_vcpu_runs_while_quiesced_and_all_run_again_after(rig: Rig) -> None:
    vcpus = rig.start(3)
    with rig.gate.quiesce():
        assert not any(vcpu.running for vcpu in vcpus)
        # Each of them asks to enter again, and has to wait.
        rig.condition.await_waits(3)
        assert not any(vcpu.running for vcpu in vcpus)
        assert [vcpu.entries for vcpu in vcpus] == [1, 1, 1]
    for vcpu in vcpus:
        vcpu.await_entry(2)
    assert not rig.gate.hold
    assert not rig.is_parked()


def test_a_vcpu_that_is_not_inside_is_neither_kicked_nor_waited_for(rig: Rig) -> None:
    rig.start(2)
    runner = rig.in_io(0)
    with rig.gate.quiesce():
        assert [vcpu.kicks for vcpu in rig.vcpus] == [0, 1]
        runner.handled.release()
        # It wants to complete its I/O by entering, and has to wait like any other.
        rig.condition.await_waits(2)
        assert runner.vcpu.completed == 0
    runner.vcpu.await_entry(2)
    assert runner.vcpu.completed == 1


def test_quiescing_waits_for_the_last_one(rig: Rig) -> None:
    vcpus = rig.start(3)
    vcpus[1].deaf = True
    done = threading.Event()

    def quiesce() -> None:
        with rig.gate.quiesce():
            assert not any(vcpu.running for vcpu in vcpus)
            done.set()

    thread = threading.Thread(target=quiesce)
    thread.start()
    # Two vCPUs at the gate, and the thread that quiesces: all wait, and one vCPU is still inside.
    rig.condition.await_waits(3)
    assert not done.is_set()
    assert vcpus[1].running
    vcpus[1].hear_again()
    assert done.wait(WATCHDOG_SECONDS)
    thread.join(WATCHDOG_SECONDS)


def test_a_vcpu_that_ends_meanwhile_hides_no_other(rig: Rig) -> None:
    # The first seat goes away while the gate looks at it: that must not make it skip the second one. Without threads of
    # the vCPUs, so that the seat goes away in one step.
    seats = [rig.gate.join(cast("Vcpu", FakeVcpu(index))) for index in range(3)]
    for seat in seats:
        seat.inside = True
    found: list[bool] = []

    def quiesce() -> None:
        with rig.gate.quiesce():
            found.extend(seat.inside for seat in seats)

    thread = threading.Thread(target=quiesce)
    thread.start()
    rig.condition.await_waits(1)
    rig.gate.leave(seats[0])
    rig.condition.await_waits(2)
    seats[2].inside = False
    rig.gate.went_out()
    try:
        rig.condition.await_waits(3)
        assert found == []
    finally:
        seats[1].inside = False
        rig.gate.went_out()
        thread.join(WATCHDOG_SECONDS)
    assert found == [False, False, False]


def test_two_that_quiesce_are_both_right(rig: Rig) -> None:
    vcpus = rig.start(2)
    inner, outer = threading.Event(), threading.Event()

    def quiesce() -> None:
        with rig.gate.quiesce():
            inner.set()
            assert outer.wait(WATCHDOG_SECONDS)

    thread = threading.Thread(target=quiesce)
    with rig.gate.quiesce():
        thread.start()
        assert inner.wait(WATCHDOG_SECONDS)
    assert rig.gate.hold
    assert [vcpu.entries for vcpu in vcpus] == [1, 1]
    outer.set()
    thread.join(WATCHDOG_SECONDS)
    for vcpu in vcpus:
        vcpu.await_entry(2)


def test_an_error_while_quiesced_lets_the_vcpus_in_again(rig: Rig) -> None:
    vcpus = rig.start(1)
    with pytest.raises(ZeroDivisionError), rig.gate.quiesce():
        raise ZeroDivisionError
    vcpus[0].await_entry(2)


def test_a_vcpu_that_does_not_come_out_is_named(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_gate, "QUIESCE_DEADLINE_SECONDS", 0.02)
    vcpus = rig.start(3)
    # The others are outside already, so that the short deadline is nobody's but the second one's.
    outside = [rig.in_io(0), rig.in_io(2)]
    vcpus[1].deaf = True
    with pytest.raises(VcpuStuck, match="vCPU 1 did not leave KVM_RUN") as caught, rig.gate.quiesce():
        pytest.fail("quiesced although a vCPU runs")
    assert caught.value.vcpu == 1
    # The others are not held for that.
    for runner in outside:
        runner.handled.release()
        runner.vcpu.await_entry(2)
    assert not rig.gate.hold


# -- pause and resume ----------------------------------------------------------------------------------------


def test_a_pause_is_reported_once_all_have_parked(rig: Rig) -> None:
    vcpus = rig.start(3)
    vcpus[2].deaf = True
    rig.gate.pause()
    rig.condition.await_waits(2)
    assert not rig.is_parked()
    vcpus[2].hear_again()
    rig.await_parked()
    assert not any(vcpu.running for vcpu in vcpus)
    assert not rig.is_parked()


def test_resumed_vcpus_run_and_pause_again(rig: Rig) -> None:
    vcpus = rig.start(2)
    for number in range(2, 6):
        rig.gate.pause()
        rig.await_parked()
        rig.gate.resume()
        for vcpu in vcpus:
            vcpu.await_entry(number)
    assert not rig.is_parked()


def test_a_pause_right_after_a_resume_is_reported_too(rig: Rig) -> None:
    vcpus = rig.start(3)
    rig.gate.pause()
    rig.await_parked()
    with rig.condition:
        # The lock is held over both, so none of the vCPUs finds the gate open in between.
        rig.gate.resume()
        rig.gate.pause()
    rig.await_parked()
    assert not any(vcpu.running for vcpu in vcpus)


def test_a_machine_without_vcpus_is_parked_at_once(rig: Rig) -> None:
    rig.gate.pause()
    assert rig.is_parked()


def test_pending_io_is_completed_before_the_pause_is_reported(rig: Rig) -> None:
    rig.start(2)
    runner = rig.in_io(0)
    rig.gate.pause()
    rig.condition.await_waits(1)
    assert not rig.is_parked()
    runner.handled.release()
    rig.await_parked()
    assert runner.vcpu.completed == 1
    assert not runner.vcpu.pending
    assert runner.vcpu.entries == 2
    assert not runner.vcpu.running
    rig.gate.resume()
    runner.vcpu.await_entry(3)


def test_an_exit_out_of_completing_is_completed_as_well(rig: Rig) -> None:
    rig.start(1)
    runner = rig.in_io(0)
    runner.vcpu.exits_after_completion.extend([IO, IO])
    rig.gate.pause()
    runner.handled.release()
    runner.handled.release()
    assert not rig.is_parked()
    runner.handled.release()
    rig.await_parked()
    assert runner.vcpu.completed == 3
    assert not runner.vcpu.pending


def test_nobody_completes_io_while_others_are_quiesced(rig: Rig) -> None:
    rig.start(1)
    runner = rig.in_io(0)
    with rig.gate.quiesce():
        rig.gate.pause()
        runner.handled.release()
        rig.condition.await_waits(1)
        assert runner.vcpu.entries == 1
        assert not rig.is_parked()
    rig.await_parked()
    assert runner.vcpu.completed == 1


def test_quiescing_waits_for_a_vcpu_that_completes_its_io_in_a_pause(rig: Rig) -> None:
    rig.start(1)
    runner = rig.in_io(0)
    rig.gate.pause()
    runner.vcpu.deaf = True
    runner.handled.release()
    runner.vcpu.await_entry(2)
    found: list[bool] = []

    def quiesce() -> None:
        with rig.gate.quiesce():
            found.append(runner.vcpu.running)

    thread = threading.Thread(target=quiesce)
    thread.start()
    try:
        rig.condition.await_waits(1)
        assert found == []
    finally:
        runner.vcpu.hear_again()
        thread.join(WATCHDOG_SECONDS)
    assert found == [False]
    rig.await_parked()


def test_quiescing_a_paused_machine_leaves_it_paused(rig: Rig) -> None:
    vcpus = rig.start(2)
    rig.gate.pause()
    rig.await_parked()
    with rig.gate.quiesce():
        assert not any(vcpu.running for vcpu in vcpus)
    assert rig.gate.hold
    assert [vcpu.entries for vcpu in vcpus] == [1, 1]
    rig.gate.resume()
    for vcpu in vcpus:
        vcpu.await_entry(2)


def test_a_resume_does_not_end_a_quiesce(rig: Rig) -> None:
    vcpus = rig.start(2)
    rig.gate.pause()
    rig.await_parked()
    with rig.gate.quiesce():
        waits = rig.condition.waits
        rig.gate.resume()
        # Both look again, and find that they are to wait on.
        rig.condition.await_waits(waits + 2)
        assert [vcpu.entries for vcpu in vcpus] == [1, 1]
    for vcpu in vcpus:
        vcpu.await_entry(2)


def test_a_pause_while_quiesced_is_reported_after_it(rig: Rig) -> None:
    vcpus = rig.start(2)
    with rig.gate.quiesce():
        rig.condition.await_waits(2)
        rig.gate.pause()
    rig.await_parked()
    assert [vcpu.entries for vcpu in vcpus] == [1, 1]


def test_a_vcpu_that_ends_does_not_keep_a_pause_waiting(rig: Rig) -> None:
    rig.start(2)
    runner = rig.in_io(0)
    rig.gate.pause()
    rig.condition.await_waits(1)
    assert not rig.is_parked()
    # In the place of completing its I/O, it finds its end there.
    runner.vcpu.exits_after_completion.append(END)
    runner.handled.release()
    rig.await_parked()
    runner.join()


# -- kick and stop -------------------------------------------------------------------------------------------


def test_a_kick_gets_those_inside_out_once(rig: Rig) -> None:
    rig.start(3)
    runner = rig.in_io(1)
    rig.gate.kick_all()
    rig.vcpus[0].await_entry(2)
    rig.vcpus[2].await_entry(2)
    assert [vcpu.kicks for vcpu in rig.vcpus] == [1, 0, 1]
    runner.handled.release()
    runner.vcpu.await_entry(2)


def ended(rig: Rig) -> bool:
    for runner in rig.runners:
        runner.thread.join(WATCHDOG_SECONDS)
    return not any(runner.thread.is_alive() for runner in rig.runners)


def test_a_stop_ends_running_vcpus(rig: Rig) -> None:
    rig.start(3)
    before = rig.gate.stopping
    rig.gate.stop()
    assert (before, rig.gate.stopping) == (False, True)
    assert ended(rig)
    assert rig.gate._seats == []


def test_a_stop_ends_paused_vcpus(rig: Rig) -> None:
    vcpus = rig.start(3)
    rig.gate.pause()
    rig.await_parked()
    rig.gate.stop()
    assert ended(rig)
    assert [vcpu.entries for vcpu in vcpus] == [1, 1, 1]


def test_a_stop_ends_vcpus_that_are_held_out(rig: Rig) -> None:
    vcpus = rig.start(3)
    with rig.gate.quiesce():
        rig.gate.stop()
        assert ended(rig)
    assert rig.gate.hold, "a stop lasts"
    assert [vcpu.entries for vcpu in vcpus] == [1, 1, 1]


def test_a_stop_ends_a_vcpu_with_io_to_complete(rig: Rig) -> None:
    rig.start(2)
    runner = rig.in_io(0)
    rig.gate.pause()
    rig.gate.stop()
    runner.handled.release()
    assert ended(rig)
    assert runner.vcpu.completed == 0


def test_a_resume_after_a_stop_lets_nobody_in(rig: Rig) -> None:
    rig.start(1)
    runner = rig.in_io(0)
    rig.gate.pause()
    rig.gate.stop()
    rig.gate.resume()
    assert rig.gate.hold
    runner.handled.release()
    assert ended(rig)
    assert runner.vcpu.entries == 1


def test_a_stop_of_a_paused_machine_ends_whoever_waits_for_the_pause(rig: Rig) -> None:
    vcpus = rig.start(2)
    vcpus[0].deaf = True
    rig.gate.pause()
    rig.condition.await_waits(1)
    assert not rig.is_parked()
    rig.gate.stop()
    vcpus[0].hear_again()
    assert ended(rig)
    # All have left, so nothing runs: the one that asked for the pause is told, instead of waiting for ever.
    rig.await_parked()


# -- a storm -------------------------------------------------------------------------------------------------


class RestlessVcpu(FakeVcpu):
    """Leaves by itself nearly always, and now and then only when it is kicked."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self._moments = random.Random(index)  # noqa: S311  reproducible moments, no secret
        self._kicked = threading.Event()

    def run(self) -> str:
        self.running = True
        self.entries += 1
        if self.pending:
            self.pending = False
            self.completed += 1
        if self._moments.randrange(50) == 0:
            assert self._kicked.wait(WATCHDOG_SECONDS), "a kick was lost"
        for _ in range(self._moments.randrange(20)):
            pass
        kicked = self._kicked.is_set()
        self.pending = not kicked and self._moments.randrange(3) == 0
        self.running = False
        return KICKED if kicked else IO if self.pending else "other"

    def request_exit(self) -> None:
        self._kicked.set()

    def clear_exit_request(self) -> None:
        self._kicked.clear()


class RestlessRunner(Runner):
    def handle_io(self) -> None:
        pass


class Storm:
    """Four restless vCPUs, one thread that quiesces all the time, and a script of random commands."""

    def __init__(self, rig: Rig, seed: int) -> None:
        self.rig = rig
        self.gate = rig.gate
        self.vcpus = [RestlessVcpu(index) for index in range(4)]
        self.runners = [RestlessRunner(rig.gate, vcpu) for vcpu in self.vcpus]
        self.moments = random.Random(seed)  # noqa: S311  reproducible moments, no secret
        self.pauses = 0
        self._over = threading.Event()
        self._failure: list[BaseException] = []
        self._other = threading.Thread(target=self._quiesce_all_the_time, name="quiesces")

    @property
    def entries(self) -> int:
        return sum(vcpu.entries for vcpu in self.vcpus)

    @property
    def completed(self) -> int:
        return sum(vcpu.completed for vcpu in self.vcpus)

    def run(self, commands: int, *, entries: int, completed: int) -> None:
        """Give so many commands, and more where the vCPUs came in too seldom by then, on a busy machine."""
        deadline = time.monotonic() + WATCHDOG_SECONDS
        with ExitStack() as stack:
            for runner in self.runners:
                runner.thread.start()
                stack.callback(runner.join)
            stack.callback(self.gate.stop)
            self._other.start()
            stack.callback(self._other.join, WATCHDOG_SECONDS)
            stack.callback(self._over.set)
            for number in itertools.count():
                enough = self.entries > entries and self.completed > completed
                if number >= commands and (enough or time.monotonic() > deadline):
                    break
                self.moments.choice([self.quiesce, self.pause, self.gate.kick_all])()
                self._let_one_on()
        if self._failure:
            raise self._failure[0]

    def quiesce(self) -> None:
        with self.gate.quiesce():
            self._look("quiesced")

    def pause(self) -> None:
        self.pauses += 1
        self.gate.pause()
        self.rig.await_parked()
        self._look("paused")
        assert not any(vcpu.pending for vcpu in self.vcpus)
        if self.moments.randrange(2):
            self.quiesce()
        self.gate.resume()

    def _look(self, state: str) -> None:
        for _ in range(self.moments.randrange(1, 5)):
            assert not any(vcpu.running for vcpu in self.vcpus), state

    def _let_one_on(self) -> None:
        """Give a vCPU the time to enter once, unless the others keep it out."""
        vcpu = self.moments.choice(self.vcpus)
        entries = vcpu.entries
        for _ in range(200):
            if vcpu.entries != entries:
                return

    def _quiesce_all_the_time(self) -> None:
        try:
            while not self._over.is_set():
                with self.gate.quiesce():
                    assert not any(vcpu.running for vcpu in self.vcpus), "quiesced by another"
        except BaseException as error:  # noqa: BLE001  shown by the test's own thread
            self._failure.append(error)


@pytest.fixture
def restless_threads() -> Iterator[None]:
    """Make the interpreter change threads a thousand times as often as it does."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("restless_threads")
@pytest.mark.parametrize("seed", range(2))
def test_in_a_storm_no_vcpu_runs_when_none_may(rig: Rig, seed: int) -> None:
    storm = Storm(rig, seed)
    storm.run(2000, entries=5000, completed=100)
    assert storm.entries > 5000
    assert storm.completed > 100
    assert storm.pauses > 300
    assert rig.gate._seats == []
