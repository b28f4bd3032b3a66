"""The conversion service with real threads as vCPUs, and a protection that writes down what it is asked."""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
import trio
from trio.testing import MockClock

from kvmd.bell import Bell
from kvmd.boot_cpu import BOOT_CPU
from kvmd.conversion.changes import Failure, FailureKind, Limits
from kvmd.conversion.messages import Answer, Cause, ConversionRequest, GuestResult, MmioAccess, Outcome
from kvmd.conversion.placement import Placement
from kvmd.conversion.rate_limit import RateLimit
from kvmd.conversion.ring import RecordRing
from kvmd.conversion.rules import ConversionRules
from kvmd.conversion.stats import ConversionStats
from kvmd.conversion_service import INLINE_PAGES, LEAK_RETRY_SECONDS, ConversionService
from kvmd.loop_turn import LoopTurn
from kvmd.memory.page_state import PageStateMap
from kvmd.protection.base import Applied
from kvmd.ranges import GpaRange, PageState
from kvmd.service_place import ServicePlace
from kvmd.stop import Stop, StopReason
from kvmd.units import PAGE_SIZE
from tests.asking import ask
from tests.conversion.scripts import MEMORY_PAGES, PINNED_PAGES, PRIVATE, SHARED, pages, request
from tests.fakes import RecordingProtection, failed

STOP = Stop.because(StopReason.OPERATOR, "over")


@dataclass
class Bench:
    """A running service and what is around it."""

    service: ConversionService
    protection: RecordingProtection
    state: PageStateMap
    rules: ConversionRules
    ring: RecordRing
    stats: ConversionStats
    lock: threading.Lock

    async def ask(self, request_: ConversionRequest) -> Answer:
        """Ask from a thread of its own, like a vCPU."""
        return await trio.to_thread.run_sync(ask, self.service, request_)

    async def until_requested(self, count: int) -> None:
        """Wait until so many requests were handed in."""
        while self.service.requested < count:
            await trio.lowlevel.checkpoint()


def build(
    limits: Limits | None = None,
    memory_pages: int = MEMORY_PAGES,
    rate: RateLimit | None = None,
    place: ServicePlace | None = None,
) -> Bench:
    """Build a service that is not running yet."""
    state = PageStateMap(memory_pages * PAGE_SIZE, PRIVATE)
    rules = ConversionRules(state, pinned=pages(0, PINNED_PAGES), limits=limits or Limits())
    protection = RecordingProtection(memory_pages * PAGE_SIZE)
    lock, ring = threading.Lock(), RecordRing()
    service = ConversionService(rules, protection, memory_lock=lock, ring=ring, rate=rate, place=place)
    return Bench(service, protection, state, rules, ring, ConversionStats(ring.reader()), lock)


@asynccontextmanager
async def running(bench: Bench) -> AsyncIterator[Bench]:
    """Run the service for the block."""
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(bench.service.run)
            yield bench
            nursery.cancel_scope.cancel()
    finally:
        bench.service.dispose()


async def test_a_fault_is_applied_then_discarded_then_answered_and_recorded() -> None:
    async with running(build()) as bench:
        answer = await bench.ask(request(3, pages(10), SHARED))
        assert answer.outcome is Outcome.CONVERTED
        assert bench.protection.log == [("apply", pages(10), SHARED), ("discard", pages(10), PRIVATE)]
        assert bench.state.state_of(pages(10)) is SHARED
        _, records = bench.ring.reader(from_oldest=True).take(10)
        (record,) = records
        assert (record.sequence, record.vcpu, record.gpa, record.size_bytes) == (1, 3, 10 * PAGE_SIZE, PAGE_SIZE)
        assert (record.came_from, record.to, record.outcome, record.merged) == (PRIVATE, SHARED, Outcome.CONVERTED, 1)
        assert record.waiting_ns >= 0
        assert record.applying_ns > 0
        assert bench.stats.snapshot().conversions == 1


class CountingRate(RateLimit):
    """A rate that is never reached, and counts."""

    counted = 0

    def count(self, now_ns: int) -> None:  # noqa: ARG002 - the clock is not looked at
        self.counted += 1


async def test_each_change_counts_once_and_what_changes_nothing_does_not() -> None:
    rate = CountingRate(1)
    large = INLINE_PAGES + 4
    async with running(build(Limits(chunk_bytes=large * PAGE_SIZE), memory_pages=256, rate=rate)) as bench:
        await bench.ask(request(0, pages(10), SHARED))
        await bench.ask(request(0, pages(10), SHARED))
        assert rate.counted == 1
        whole = request(0, pages(50, 3 * large), SHARED, cause=Cause.EXPLICIT)
        assert (await bench.ask(whole)).outcome is Outcome.CONVERTED
        assert rate.counted == 4


async def test_opposite_directions_are_one_critical_section_each() -> None:
    async with running(build()) as bench:
        async with trio.open_nursery() as nursery:
            for vcpu in range(8):
                nursery.start_soon(bench.ask, request(vcpu, pages(10), SHARED if vcpu % 2 else PRIVATE))
        steps = [(name, side) for name, _, side in bench.protection.log]
        pairs = [(("apply", SHARED), ("discard", PRIVATE)), (("apply", PRIVATE), ("discard", SHARED))]
        assert len(steps) % 2 == 0
        # Never two changes interleaved: each apply is followed by the discard of the side that it left behind.
        assert all((steps[at], steps[at + 1]) in pairs for at in range(0, len(steps), 2))


async def test_requests_that_wait_together_are_merged() -> None:
    bench = build()
    answers: list[Answer] = []
    waiting = threading.Barrier(4)

    def vcpu(index: int) -> None:
        waiting.wait()
        answers.append(ask(bench.service, request(index, pages(10 + index), SHARED)))

    threads = [threading.Thread(target=vcpu, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    # The service does not run yet, so all four requests are in its channel before it looks.
    await bench.until_requested(4)
    async with running(bench):
        for thread in threads:
            await trio.to_thread.run_sync(thread.join)
    assert [name for name, _, _ in bench.protection.log] == ["apply", "discard"]
    assert bench.protection.log[0][1] == pages(10, 4)
    _, records = bench.ring.reader(from_oldest=True).take(10)
    assert [record.merged for record in records] == [4] * 4
    assert len(answers) == 4


async def test_a_large_change_is_made_off_the_event_loop_and_a_small_one_gets_in_between() -> None:
    bench = build(Limits(chunk_bytes=(INLINE_PAGES + 4) * PAGE_SIZE), memory_pages=256)
    first_chunk, go_on = threading.Event(), threading.Event()

    def hold_first(range_: GpaRange) -> None:
        if range_.start == 10 * PAGE_SIZE:
            first_chunk.set()
            go_on.wait()

    bench.protection.before_apply = hold_first
    loop_thread = threading.get_ident()
    async with running(bench), trio.open_nursery() as nursery:
        nursery.start_soon(bench.ask, request(0, pages(10, 100), SHARED, Cause.EXPLICIT))
        await trio.to_thread.run_sync(first_chunk.wait)
        # The loop is free while a chunk is being made: this very line runs on it.
        nursery.start_soon(bench.ask, request(1, pages(200), SHARED))
        await bench.until_requested(2)
        go_on.set()
    _, records = bench.ring.reader(from_oldest=True).take(10)
    assert [record.vcpu for record in records] == [1, 0], "the small one is answered first"
    assert bench.protection.log[2] == ("apply", pages(200), SHARED)
    assert loop_thread not in bench.protection.threads


async def test_the_chunks_of_a_large_change_follow_each_other_in_one_worker_thread() -> None:
    chunk = INLINE_PAGES + 4
    bench = build(Limits(chunk_bytes=chunk * PAGE_SIZE), memory_pages=256)
    async with running(bench):
        await bench.ask(request(0, pages(10, 8 * chunk), SHARED, Cause.EXPLICIT))
    assert [range_ for name, range_, _ in bench.protection.log if name == "apply"] == [
        pages(10 + index * chunk, chunk) for index in range(8)
    ]
    assert len(set(bench.protection.threads)) == 1
    assert threading.get_ident() not in bench.protection.threads


async def test_cancelling_in_the_middle_of_a_large_change_ends_it_after_a_chunk() -> None:
    bench = build(Limits(chunk_bytes=(INLINE_PAGES + 4) * PAGE_SIZE), memory_pages=256)
    held, go_on = threading.Event(), threading.Event()

    def hold(_: GpaRange) -> None:
        held.set()
        go_on.wait()

    bench.protection.before_apply = hold
    answers: list[Answer] = []
    thread = threading.Thread(
        target=lambda: answers.append(ask(bench.service, request(0, pages(10, 200), SHARED, Cause.EXPLICIT)))
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(bench.service.run)
        thread.start()
        await trio.to_thread.run_sync(held.wait)
        nursery.cancel_scope.cancel()
        go_on.set()
    thread.join()
    bench.service.dispose()
    (answer,) = answers
    assert (answer.outcome, answer.stop is not None) == (Outcome.FAILED, True)
    first = pages(10, INLINE_PAGES + 4)
    assert [range_ for name, range_, _ in bench.protection.log if name == "apply"] == [first]
    assert (bench.state.state_of(first), bench.state.state_of(pages(100))) == (SHARED, PRIVATE)


async def test_an_mmio_load_reads_zeros_of_the_new_side_and_a_store_stays() -> None:
    async with running(build()) as bench:
        gpa = 10 * PAGE_SIZE + 16
        bench.protection.access(PRIVATE, MmioAccess(gpa, 2, b"hi"))
        store = request(0, pages(10), SHARED, access=MmioAccess(gpa, 2, b"ab"))
        assert (await bench.ask(store)).outcome is Outcome.CONVERTED
        load = request(1, pages(10), SHARED, access=MmioAccess(gpa, 4, None))
        answer = await bench.ask(load)
        assert (answer.outcome, answer.data) == (Outcome.SPURIOUS, b"ab\0\0")
        # Back: the store is gone with the side that it was made to, and so is what was private before.
        back = await bench.ask(request(0, pages(10), PRIVATE, access=MmioAccess(gpa, 4, None)))
        assert (back.outcome, back.data) == (Outcome.CONVERTED, b"\0\0\0\0")


async def test_a_refused_access_touches_nothing() -> None:
    async with running(build()) as bench:
        answer = await bench.ask(request(0, pages(1), SHARED, access=MmioAccess(PAGE_SIZE, 1, b"x")))
        assert answer.stop is not None
        assert bench.protection.sides[SHARED] == {}


async def test_a_failing_change_answers_eagain_and_is_tracked_exactly() -> None:
    async with running(build()) as bench:
        bench.protection.fail_apply.append(failed(pages(10, 4), Failure(FailureKind.REFUSED, "EIO"), pages=1))
        answer = await bench.ask(request(0, pages(10, 4), SHARED, Cause.EXPLICIT))
        assert (answer.outcome, answer.result) == (Outcome.FAILED, GuestResult.EAGAIN)
        assert bench.state.state_of(pages(10)) is SHARED
        assert bench.state.state_of(pages(11, 3)) is PRIVATE
        # What was applied was discarded all the same.
        assert bench.protection.log == [("discard", pages(10), PRIVATE)]


async def test_a_failed_discard_is_kept_and_tried_again(
    autojump_clock: MockClock,  # noqa: ARG001 - a clock that jumps
) -> None:
    async with running(build()) as bench:
        bench.protection.fail_discard.extend([True, True])
        assert bench.rules.leaked_bytes == 0
        answers: list[Answer] = []
        thread = threading.Thread(target=lambda: answers.append(ask(bench.service, request(0, pages(10), SHARED))))
        thread.start()
        while not answers:
            await trio.lowlevel.checkpoint()
        thread.join()
        assert answers[0].outcome is Outcome.CONVERTED
        assert bench.rules.leaked_bytes == PAGE_SIZE
        await trio.sleep(LEAK_RETRY_SECONDS * 1.5)
        assert bench.rules.leaked_bytes == PAGE_SIZE, "the first retry fails too"
        await trio.sleep(LEAK_RETRY_SECONDS)
        assert bench.rules.leaked_bytes == 0
        assert bench.protection.log[-1] == ("discard", pages(10), PRIVATE)


async def test_closing_answers_all_that_waits_and_all_that_comes() -> None:
    bench = build(memory_pages=256)
    held, go_on = threading.Event(), threading.Event()

    def hold(_: GpaRange) -> None:
        held.set()
        go_on.wait()

    bench.protection.before_apply = hold
    answers: dict[str, Answer] = {}

    async def ask(name: str, request_: ConversionRequest) -> None:
        answers[name] = await bench.ask(request_)

    async with running(bench), trio.open_nursery() as nursery:
        nursery.start_soon(ask, "large", request(0, pages(10, 100), SHARED, Cause.EXPLICIT))
        await trio.to_thread.run_sync(held.wait)
        nursery.start_soon(ask, "waiting", request(1, pages(12), PRIVATE))
        await bench.until_requested(2)
        bench.service.close(STOP)
        await ask("late", request(2, pages(200), SHARED))
        go_on.set()
    assert {name: answer.stop for name, answer in answers.items()} == dict.fromkeys(("large", "waiting", "late"), STOP)
    # The change that was under way is made to its end, and recorded.
    assert bench.state.state_of(pages(10, 100)) is SHARED


async def test_an_access_that_fails_leaves_no_thread_blocked(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = build()

    def fail(state: PageState, access: MmioAccess) -> bytes:
        raise RuntimeError(f"{state.value} {access.gpa:#x}")

    monkeypatch.setattr(bench.protection, "access", fail)
    answers: dict[int, Answer] = {}

    async def read(vcpu: int, page: int) -> None:
        access = MmioAccess(page * PAGE_SIZE, 4, None)
        answers[vcpu] = await bench.ask(request(vcpu, pages(page), PRIVATE, access=access))

    # Settled together: nothing is to be changed.
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, 0, 10)
        nursery.start_soon(read, 1, 12)
        await bench.until_requested(2)
        async with running(bench):
            while len(answers) < 2:
                await trio.lowlevel.checkpoint()
    stops = {vcpu: answer.stop for vcpu, answer in answers.items()}
    assert {vcpu: stop and (stop.reason, stop.vcpu) for vcpu, stop in stops.items()} == {
        0: (StopReason.BUG, 0),
        1: (StopReason.BUG, 1),
    }


class ToldPlace(ServicePlace):
    """A place that writes down what it is told, and is taken whenever it may be."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("kvmd.service_place.Placement", AlwaysThere)
        super().__init__(moves=True)
        self.told: list[str] = []
        self.vcpus: list[int] = []

    def served(self, vcpus: Iterable[int]) -> None:
        self.vcpus += vcpus

    def pause(self) -> None:
        self.told.append("pause")
        super().pause()

    def resume(self) -> None:
        self.told.append("resume")
        super().resume()

    def leave(self) -> None:
        self.told.append("leave")
        super().leave()


class AlwaysThere(Placement):
    """A decision for the boot CPU."""

    def look(self, now_ns: int, runnable: int) -> None:  # noqa: ARG002 - decided
        self.on_boot_cpu = True


async def ask_in_a_row(bench: Bench, requests: list[ConversionRequest]) -> None:
    """Hand each in while the one before is being served, so that the service never finds its queue empty."""
    gates = [threading.Event() for _ in requests]
    handed_in = threading.Event()

    def vcpu(index: int) -> None:
        gates[index].wait()
        ask(bench.service, requests[index])

    def next_one(_: GpaRange) -> None:
        index = len(bench.protection.threads) + 1
        if index < len(requests):
            gates[index].set()
            while bench.service.requested <= index:
                handed_in.wait(0.001)

    bench.protection.before_apply = next_one
    gates[0].set()
    async with trio.open_nursery() as nursery:
        for index in range(len(requests)):
            nursery.start_soon(trio.to_thread.run_sync, vcpu, index)


async def test_others_have_the_loop_after_a_turn_and_find_its_thread_where_the_scheduler_likes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kvmd.conversion_service.TURN_NS", 0)
    anywhere = os.sched_getaffinity(0)
    there = {BOOT_CPU} if BOOT_CPU in anywhere else anywhere
    place = ToldPlace(monkeypatch)
    bench = build(place=place)
    between: list[set[int]] = []
    during: list[set[int]] = []

    async def other() -> None:
        while len(bench.protection.threads) < 10:
            between.append(os.sched_getaffinity(0))
            await trio.lowlevel.checkpoint()

    async with running(bench), trio.open_nursery() as nursery:
        nursery.start_soon(other)
        apply = bench.protection.apply

        def watched(range_: GpaRange, to: PageState) -> Applied:
            during.append(os.sched_getaffinity(0))
            return apply(range_, to)

        monkeypatch.setattr(bench.protection, "apply", watched)
        await ask_in_a_row(bench, [request(n % 2, pages(10), SHARED if n % 2 else PRIVATE) for n in range(1, 11)])
    assert during[0] == anywhere
    assert during[2:] == [there] * 8
    assert len(between) > 5
    assert all(mask == anywhere for mask in between)
    assert place.told[:4] == ["pause", "resume"] * 2
    assert place.told[-1] == "leave"
    assert place.vcpus == [1, 0] * 5
    assert os.sched_getaffinity(0) == anywhere


async def test_others_have_the_loop_for_long_after_some_requests_and_for_one_pass_after_a_few(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kvmd.conversion_service.TURN_NS", 0)
    monkeypatch.setattr("kvmd.conversion_service.FULL_TURN_REQUESTS", 3)
    bench = build()
    given: list[int] = []
    give = LoopTurn.give

    async def counted(turn: LoopTurn) -> None:
        given.append(bench.ring.appended)
        await give(turn)

    monkeypatch.setattr(LoopTurn, "give", counted)
    async with running(bench):
        await ask_in_a_row(bench, [request(n % 2, pages(10), SHARED if n % 2 else PRIVATE) for n in range(1, 10)])
    assert given == [3, 6, 9]


async def test_a_worker_thread_for_a_large_change_inherits_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmd.conversion_service.TURN_NS", 0)
    place = ToldPlace(monkeypatch)
    bench = build(Limits(chunk_bytes=(INLINE_PAGES + 4) * PAGE_SIZE), memory_pages=256, place=place)
    last_told: list[str] = []
    apply = bench.protection.apply

    def watched(range_: GpaRange, to: PageState) -> Applied:
        if range_.size_bytes > PAGE_SIZE:
            last_told.append(place.told[-1])
        return apply(range_, to)

    monkeypatch.setattr(bench.protection, "apply", watched)
    async with running(bench):
        small = [request(n % 2, pages(10), SHARED if n % 2 else PRIVATE) for n in range(1, 7)]
        await ask_in_a_row(bench, [*small, request(2, pages(50, 60), SHARED, cause=Cause.EXPLICIT)])
    assert last_told == ["leave"] * 3
    assert "resume" in place.told


async def test_cancelling_the_service_leaves_no_thread_blocked() -> None:
    bench = build()
    answers: list[Answer] = []
    threads = [
        threading.Thread(
            target=lambda index=index: answers.append(ask(bench.service, request(index, pages(10 + 2 * index), SHARED)))
        )
        for index in range(8)
    ]
    for thread in threads:
        thread.start()
    await bench.until_requested(8)
    with trio.CancelScope() as scope:
        scope.cancel()
        await bench.service.run()
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive()
    assert len(answers) == 8
    bench.service.dispose()


async def test_the_host_accessor_waits_for_a_conversion_and_then_is_refused() -> None:
    bench = build()
    async with running(bench):
        with bench.lock:
            # Somebody reads shared memory: the conversion has to wait for it.
            done = trio.Event()

            async def convert() -> None:
                await bench.ask(request(0, pages(10, INLINE_PAGES + 1), SHARED, Cause.EXPLICIT))
                done.set()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(convert)
                await trio.testing.wait_all_tasks_blocked(0.05)
                assert bench.protection.log == []
                assert not done.is_set()
                bench.lock.release()
                await done.wait()
                bench.lock.acquire()
        assert bench.state.state_of(pages(10)) is SHARED


@pytest.mark.parametrize("vcpus", [1, 4, 16])
async def test_many_threads_fight_and_every_request_has_one_answer(vcpus: int) -> None:
    rounds = 60
    async with running(build()) as bench:
        counts: list[int] = []

        def vcpu(index: int) -> None:
            answered = 0
            with Bell() as bell:
                for round_ in range(rounds):
                    to: PageState = SHARED if (index + round_) % 2 else PRIVATE
                    page = PINNED_PAGES + (index * 7 + round_) % 6
                    answer = bench.service.request(
                        request(index, pages(page), to, entered_at=bench.service.sequence), bell
                    )
                    answered += answer.outcome in {Outcome.CONVERTED, Outcome.SPURIOUS}
            counts.append(answered)

        async with trio.open_nursery() as nursery:
            for index in range(vcpus):
                nursery.start_soon(trio.to_thread.run_sync, vcpu, index)
        assert counts == [rounds] * vcpus
        assert bench.ring.appended == rounds * vcpus
        # The log of what was done leads to the state that is tracked.
        replayed: dict[int, PageState] = dict.fromkeys(range(MEMORY_PAGES), PRIVATE)
        for name, range_, side in bench.protection.log:
            for page in range(range_.start // PAGE_SIZE, range_.end // PAGE_SIZE):
                if name == "apply":
                    replayed[page] = side
                else:
                    assert replayed[page] is side.opposite, "only a dead side is ever discarded"
        tracked = [segment.state for segment in bench.state.segments() for _ in range(segment.range.pages)]
        assert tracked == list(replayed.values())
