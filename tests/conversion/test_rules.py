"""The rules of conversion, one line of 'Races, and what is right' after the other."""

from __future__ import annotations

import pytest

from kvmd.conversion.changes import Failure, FailureKind, ImplicitPolicy, Limits
from kvmd.conversion.messages import Cause, ConversionRequest, GuestResult, MmioAccess, Outcome
from kvmd.conversion.rules import SHORT_TURNS
from kvmd.ranges import PageState
from kvmd.stop import Stop, StopReason
from kvmd.units import MIB, PAGE_SIZE
from tests.conversion.scripts import PRIVATE, SHARED, Script, pages, request

EXPLICIT = Cause.EXPLICIT
STOP = Stop.because(StopReason.OPERATOR, "over")


def test_a_fault_converts_its_page_and_nothing_else() -> None:
    script = Script()
    answer = script.ask(request(0, pages(10), SHARED))
    assert answer.outcome is Outcome.CONVERTED
    assert answer.stop is None
    assert [change.range for change in script.changes] == [pages(10)]
    assert script.state.state_of(pages(10)) is SHARED
    assert script.state.state_of(pages(4, 6)) is PRIVATE
    assert script.state.state_of(pages(11, 53)) is PRIVATE
    assert script.rules.sequence == 1


def test_a_fault_of_less_than_a_page_converts_the_whole_page() -> None:
    script = Script()
    odd = ConversionRequest(vcpu=0, cause=Cause.IMPLICIT, gpa=10 * PAGE_SIZE + 8, size_bytes=4, to=SHARED, entered_at=0)
    assert script.ask(odd).outcome is Outcome.CONVERTED
    assert [change.range for change in script.changes] == [pages(10)]


# -- race 1: stale faults ----------------------------------------------------------------------------------------------


def test_race_1_a_fault_that_another_vcpu_answered_already_changes_nothing() -> None:
    script = Script()
    first = script.submit(request(0, pages(10), SHARED))
    second = script.submit(request(1, pages(10), SHARED))
    change = script.step()
    assert change is not None
    script.make(change)
    script.run()
    # One change, hence one discard: the second fault must not destroy what the first one's guest has written.
    assert len(script.changes) == 1
    assert [ticket.answer and ticket.answer.outcome for ticket in (first, second)] == [Outcome.CONVERTED] * 2

    late = script.ask(request(1, pages(10), SHARED))
    assert late.outcome is Outcome.SPURIOUS
    assert late.stop is None
    assert len(script.changes) == 1


# -- race 2: opposite directions ---------------------------------------------------------------------------------------


def test_race_2_opposite_directions_are_two_changes_one_after_the_other() -> None:
    script = Script()
    there = script.submit(request(0, pages(10), SHARED))
    back = script.submit(request(1, pages(10), PRIVATE))
    change = script.step()
    assert change is not None
    assert change.to is SHARED
    assert not script.is_answered(back), "the second has to wait for the first to be finished"
    with pytest.raises(RuntimeError, match="not finished"):
        script.rules.next_change()
    script.make(change)
    script.run()
    assert [change.to for change in script.changes] == [SHARED, PRIVATE]
    assert there.answer is not None
    assert back.answer is not None
    assert (there.answer.outcome, back.answer.outcome) == (Outcome.CONVERTED, Outcome.CONVERTED)
    assert script.state.state_of(pages(10)) is PRIVATE


# -- race 3: a fault older than an explicit conversion -----------------------------------------------------------------


def test_race_3_a_fault_from_before_an_explicit_conversion_is_stale() -> None:
    script = Script()
    entered = script.rules.sequence
    assert script.ask(request(1, pages(10, 4), SHARED, EXPLICIT)).outcome is Outcome.CONVERTED
    stale = script.ask(request(0, pages(11), PRIVATE, entered_at=entered))
    assert stale.outcome is Outcome.STALE
    assert stale.stop is None
    assert script.state.state_of(pages(11)) is SHARED
    # Entered again since, and it still faults: now it is meant.
    assert script.ask(request(0, pages(11), PRIVATE, entered_at=script.rules.sequence)).outcome is Outcome.CONVERTED


def test_race_3_an_implicit_conversion_does_not_make_a_fault_stale() -> None:
    script = Script()
    script.ask(request(1, pages(10), SHARED))
    assert script.ask(request(0, pages(10), PRIVATE, entered_at=0)).outcome is Outcome.CONVERTED


def test_race_3_an_explicit_conversion_of_other_pages_does_not_make_a_fault_stale() -> None:
    script = Script()
    script.ask(request(1, pages(20), SHARED, EXPLICIT))
    assert script.ask(request(0, pages(10), SHARED, entered_at=0)).outcome is Outcome.CONVERTED


def test_race_3_an_mmio_access_cannot_be_retried_so_it_converts() -> None:
    script = Script()
    script.ask(request(1, pages(10), SHARED, EXPLICIT))
    access = MmioAccess(10 * PAGE_SIZE, 8, None)
    assert script.ask(request(0, pages(10), PRIVATE, access=access)).outcome is Outcome.CONVERTED


# -- race 4: order, and discards that fail -----------------------------------------------------------------------------


def test_race_4_a_failed_discard_is_a_success_and_a_leak_that_is_kept() -> None:
    script = Script()
    ticket = script.submit(request(0, pages(10, 2), SHARED, EXPLICIT))
    change = script.step()
    assert change is not None
    applied = script.rules.commit(change, change.range.end)
    assert applied == pages(10, 2)
    script.rules.leak(PRIVATE, applied)
    script.rules.finish(change)
    assert ticket.answer is not None
    assert (ticket.answer.outcome, ticket.answer.result) == (Outcome.CONVERTED, GuestResult.SUCCESS)
    assert script.rules.leaks() == [(PRIVATE, pages(10, 2))]
    assert script.rules.leaked_bytes == 2 * PAGE_SIZE
    script.rules.discarded(PRIVATE, pages(10))
    assert script.rules.leaks() == [(PRIVATE, pages(11))]


def test_race_4_a_leaked_side_is_discarded_before_it_becomes_live_again() -> None:
    script = Script()
    script.submit(request(0, pages(10, 2), SHARED, EXPLICIT))
    change = script.step()
    assert change is not None
    script.rules.commit(change, change.range.end)
    script.rules.leak(PRIVATE, pages(10, 2))
    script.rules.finish(change)

    script.submit(request(0, pages(11, 2), PRIVATE, EXPLICIT))
    back = script.step()
    assert back is not None
    assert back.discard_first == (pages(11),)
    script.make(back)
    assert script.rules.leaks() == [(PRIVATE, pages(10))]


def test_race_4_where_that_discard_fails_the_conversion_does() -> None:
    script = Script()
    script.submit(request(0, pages(10), SHARED, EXPLICIT))
    change = script.step()
    assert change is not None
    script.rules.commit(change, change.range.end)
    script.rules.leak(PRIVATE, pages(10))
    script.rules.finish(change)

    for cause, stop in ((EXPLICIT, None), (Cause.IMPLICIT, StopReason.DISCARD_FAILED)):
        ticket = script.submit(request(0, pages(10), PRIVATE, cause, entered_at=script.rules.sequence))
        back = script.step()
        assert back is not None
        script.rules.commit(back, back.range.start)
        script.rules.finish(back, Failure(FailureKind.DISCARD_FIRST, "no"))
        assert ticket.answer is not None
        assert ticket.answer.result is GuestResult.EAGAIN
        assert (ticket.answer.stop and ticket.answer.stop.reason) == stop
        assert script.state.state_of(pages(10)) is SHARED
        assert script.rules.leaks() == [(PRIVATE, pages(10))]


# -- race 5: the same fault again --------------------------------------------------------------------------------------


def test_race_5_the_same_fault_without_progress_stops_the_machine_with_a_diagnosis() -> None:
    script = Script(Limits(no_progress=3))
    outcomes = [script.ask(request(0, pages(10), PRIVATE)) for _ in range(4)]
    assert [answer.outcome for answer in outcomes] == [Outcome.SPURIOUS] * 3 + [Outcome.FAILED]
    stop = outcomes[-1].stop
    assert stop is not None
    assert stop.reason is StopReason.NO_PROGRESS
    assert "0xa000" in stop.message
    assert "private already" in stop.message
    assert script.changes == []


def test_race_5_counts_from_the_conversion_that_did_not_help() -> None:
    script = Script(Limits(no_progress=3))
    assert script.ask(request(0, pages(10), SHARED)).outcome is Outcome.CONVERTED
    answers = [script.ask(request(0, pages(10), SHARED)) for _ in range(3)]
    assert [answer.stop is None for answer in answers] == [True, True, False]


def test_race_5_honest_contention_moves_the_generation_and_never_stops_anybody() -> None:
    script = Script(Limits(no_progress=2))
    for _ in range(50):
        assert script.ask(request(0, pages(10), SHARED)).stop is None
        assert script.ask(request(2, pages(10), SHARED)).stop is None
        assert script.ask(request(1, pages(10), PRIVATE)).stop is None
    # The counters are each vCPU's own: two that fault alike are not one that is stuck.
    assert script.ask(request(3, pages(20), PRIVATE)).stop is None
    assert script.ask(request(4, pages(20), PRIVATE)).stop is None
    assert script.ask(request(5, pages(20), PRIVATE)).stop is None


def test_race_5_another_page_in_between_is_progress() -> None:
    script = Script(Limits(no_progress=2))
    for _ in range(10):
        assert script.ask(request(0, pages(10), PRIVATE)).stop is None
        assert script.ask(request(0, pages(11), PRIVATE)).stop is None


def test_race_5_mmio_accesses_always_progress() -> None:
    script = Script(Limits(no_progress=2))
    access = MmioAccess(10 * PAGE_SIZE, 1, b"x")
    for _ in range(10):
        answer = script.ask(request(0, pages(10), PRIVATE, access=access))
        assert (answer.outcome, answer.stop) == (Outcome.SPURIOUS, None)


# -- race 6: teardown --------------------------------------------------------------------------------------------------


def test_race_6_teardown_answers_everything_once() -> None:
    script = Script(Limits(chunk_bytes=PAGE_SIZE))
    tickets = [
        script.submit(request(0, pages(10, 20), SHARED, EXPLICIT)),
        script.submit(request(1, pages(40), SHARED)),
        script.submit(request(2, pages(12), PRIVATE)),
    ]
    change = script.step()
    assert change is not None
    late = script.submit(request(3, pages(50), SHARED))
    script.rules.fail_all(STOP)
    settled = script.take_settled()
    assert sorted(ticket.request.vcpu for ticket in settled) == [0, 1, 2, 3]
    assert all(ticket.answer is not None and ticket.answer.stop is STOP for ticket in [*tickets, late])
    # The change that was being made meanwhile comes to its end and is recorded: the state stays true.
    script.make(change)
    assert script.state.state_of(change.range) is change.to
    assert script.take_settled() == []
    assert script.step() is None


# -- race 7: implicit conversions as a matter of policy ----------------------------------------------------------------


@pytest.mark.parametrize("to", [PRIVATE, SHARED])
def test_race_7_deny_stops_at_any_implicit_conversion(to: PageState) -> None:
    script = Script(Limits(implicit=ImplicitPolicy.DENY))
    script.ask(request(0, pages(10), SHARED, EXPLICIT))
    page = pages(10) if to is PRIVATE else pages(11)
    answer = script.ask(request(0, page, to, entered_at=script.rules.sequence))
    assert answer.outcome is Outcome.REFUSED
    assert answer.stop is not None
    assert answer.stop.reason is StopReason.IMPLICIT_DENIED
    assert 'conversion.implicit = "deny"' in answer.stop.message
    assert len(script.changes) == 1


def test_race_7_keep_explicit_protects_a_live_io_page_but_not_others() -> None:
    script = Script(Limits(implicit=ImplicitPolicy.KEEP_EXPLICIT))
    script.ask(request(0, pages(10), SHARED, EXPLICIT))
    assert script.ask(request(0, pages(11), SHARED)).outcome is Outcome.CONVERTED
    after = script.rules.sequence
    assert script.ask(request(0, pages(11), PRIVATE, entered_at=after)).outcome is Outcome.CONVERTED
    denied = script.ask(request(0, pages(10), PRIVATE, entered_at=after))
    assert denied.stop is not None
    assert denied.stop.reason is StopReason.IMPLICIT_DENIED
    assert script.state.state_of(pages(10)) is SHARED


def test_race_7_keep_explicit_survives_compaction() -> None:
    script = Script(Limits(implicit=ImplicitPolicy.KEEP_EXPLICIT))
    script.ask(request(0, pages(10), SHARED, EXPLICIT))
    script.ask(request(0, pages(11), SHARED))
    script.state.compact()
    answer = script.ask(request(0, pages(10), PRIVATE, entered_at=script.rules.sequence))
    assert answer.stop is not None
    assert script.ask(request(1, pages(11), PRIVATE, entered_at=script.rules.sequence)).stop is None


# -- merging, chunks and turns -----------------------------------------------------------------------------------------


def test_adjacent_waiting_requests_are_one_change() -> None:
    script = Script()
    tickets = [script.submit(request(vcpu, pages(10 + page), SHARED)) for vcpu, page in enumerate((1, 0, 3, 2))]
    script.run()
    assert [change.range for change in script.changes] == [pages(10, 4)]
    assert [ticket.merged for ticket in tickets] == [4, 4, 4, 4]
    assert all(ticket.answer is not None and ticket.answer.outcome is Outcome.CONVERTED for ticket in tickets)


def test_requests_of_another_direction_or_cause_are_not_merged() -> None:
    script = Script()
    script.ask(request(0, pages(11), SHARED))
    script.changes.clear()
    script.submit(request(0, pages(10), SHARED))
    script.submit(request(1, pages(11), PRIVATE))
    script.submit(request(2, pages(9), SHARED, EXPLICIT))
    script.run()
    assert [(change.range, change.to) for change in script.changes] == [
        (pages(10), SHARED),
        (pages(11), PRIVATE),
        (pages(9), SHARED),
    ]


def test_merging_does_not_overtake_an_earlier_request_on_the_same_page() -> None:
    script = Script()
    script.submit(request(0, pages(10), SHARED))
    script.submit(request(1, pages(10, 2), PRIVATE, EXPLICIT))
    script.submit(request(2, pages(11), SHARED))
    script.run()
    assert script.state.state_of(pages(11)) is SHARED
    assert script.state.state_of(pages(10)) is PRIVATE


def test_a_large_range_is_made_in_chunks_and_pages_in_that_state_already_are_left_out() -> None:
    script = Script(Limits(chunk_bytes=8 * PAGE_SIZE))
    script.ask(request(0, pages(10, 2), SHARED, EXPLICIT))
    script.ask(request(0, pages(20, 4), SHARED, EXPLICIT))
    script.changes.clear()
    assert script.ask(request(0, pages(8, 22), SHARED, EXPLICIT)).result is GuestResult.SUCCESS
    assert script.state.state_of(pages(8, 22)) is SHARED
    assert all(change.range.size_bytes <= 8 * PAGE_SIZE for change in script.changes)
    assert [change.range for change in script.changes] == [pages(8, 8), pages(16, 4), pages(24, 6)]


def test_a_small_request_waits_no_longer_than_one_chunk() -> None:
    script = Script(Limits(chunk_bytes=4 * PAGE_SIZE))
    large = script.submit(request(0, pages(4, 40), SHARED, EXPLICIT))
    first = script.step()
    assert first is not None
    small = script.submit(request(1, pages(50), SHARED))
    script.make(first)
    second = script.step()
    assert second is not None
    assert second.range == pages(50)
    script.make(second)
    assert script.is_answered(small)
    assert not script.is_answered(large)
    script.run()
    assert large.answer is not None
    assert large.answer.outcome is Outcome.CONVERTED


def test_small_requests_do_not_starve_a_large_one() -> None:
    script = Script(Limits(chunk_bytes=4 * PAGE_SIZE))
    large = script.submit(request(0, pages(4, 8), SHARED, EXPLICIT))
    for turn in range(10 * SHORT_TURNS):
        if large.answer is not None:
            break
        script.submit(request(1, pages(50), PRIVATE if turn % 2 else SHARED))
        change = script.step()
        assert change is not None
        script.make(change)
    assert large.answer is not None


def test_a_request_in_the_way_of_a_large_one_waits_for_all_of_it() -> None:
    script = Script(Limits(chunk_bytes=4 * PAGE_SIZE))
    large = script.submit(request(0, pages(4, 12), SHARED, EXPLICIT))
    change = script.step()
    assert change is not None
    back = script.submit(request(1, pages(5), PRIVATE, EXPLICIT))
    stale = script.submit(request(2, pages(6), PRIVATE))
    script.make(change)
    for _ in range(2):
        change = script.step()
        assert change is not None
        assert change.tickets == (large,)
        assert not script.is_answered(back)
        assert not script.is_answered(stale)
        script.make(change)
    assert large.answer is not None, "told the truth: all of it is shared at this moment"
    script.run()
    assert back.answer is not None
    assert back.answer.outcome is Outcome.CONVERTED
    assert stale.answer is not None
    assert stale.answer.outcome is Outcome.STALE, "it entered before the explicit conversion"
    assert script.state.state_of(pages(5)) is PRIVATE
    assert script.state.state_of(pages(6)) is SHARED


# -- the host fails ----------------------------------------------------------------------------------------------------


def test_what_was_applied_before_a_failure_is_tracked_exactly() -> None:
    script = Script(Limits(chunk_bytes=4 * PAGE_SIZE))
    ticket = script.submit(request(0, pages(8, 12), SHARED, EXPLICIT))
    first = script.step()
    assert first is not None
    script.make(first)
    second = script.step()
    assert second is not None
    script.make(second, failure=Failure(FailureKind.REFUSED, "EIO"), upto=second.range.start + PAGE_SIZE)
    assert ticket.answer is not None
    assert ticket.answer.result is GuestResult.EAGAIN
    assert script.state.state_of(pages(8, 5)) is SHARED
    assert script.state.state_of(pages(13, 7)) is PRIVATE
    assert script.ask(request(0, pages(8, 12), SHARED, EXPLICIT)).result is GuestResult.SUCCESS


def test_of_merged_requests_those_within_what_was_applied_succeed() -> None:
    script = Script()
    tickets = [script.submit(request(vcpu, pages(10 + vcpu), SHARED)) for vcpu in range(3)]
    change = script.step()
    assert change is not None
    script.make(change, failure=Failure(FailureKind.SLOTS, "full"), upto=pages(11).end)
    outcomes = [ticket.answer.outcome for ticket in tickets if ticket.answer is not None]
    assert outcomes == [Outcome.CONVERTED, Outcome.CONVERTED, Outcome.FAILED]


def test_a_guest_that_alternates_pages_pays_with_an_error_not_the_host_with_memory() -> None:
    script = Script(Limits(segments=12))
    results = [script.ask(request(0, pages(page), SHARED, EXPLICIT)).result for page in range(4, 60, 2)]
    assert GuestResult.EAGAIN in results
    assert len(script.state) <= 12
    stop = script.ask(request(0, pages(59), SHARED)).stop
    assert stop is not None
    assert stop.reason is StopReason.STATE_EXHAUSTED
    # Making room helps: what merges is one range again.
    assert script.ask(request(0, pages(4, 40), PRIVATE, EXPLICIT)).result is not None


def test_generations_that_only_differ_do_not_fill_the_state() -> None:
    script = Script(Limits(segments=12))
    for page in range(4, 60):
        assert script.ask(request(0, pages(page), SHARED, EXPLICIT)).result is GuestResult.SUCCESS
    assert len(script.state) <= 12


def test_a_large_machine_costs_nothing_until_it_converts() -> None:
    script = Script(Limits(chunk_bytes=2 * MIB), memory_pages=(1 << 40) // PAGE_SIZE)
    assert len(script.state) == 1
    assert script.ask(request(0, pages(1 << 27), SHARED)).outcome is Outcome.CONVERTED
    assert len(script.state) == 3


@pytest.mark.parametrize("others", [[], [20], [20, 30], [20, 21]])
def test_a_fault_that_has_nothing_to_do_with_the_others_is_a_change_of_its_own_with_its_answer(
    others: list[int],
) -> None:
    script = Script()
    first = script.submit(request(0, pages(10), SHARED))
    for vcpu, page in enumerate(others, 1):
        script.submit(request(vcpu, pages(page), SHARED))
    change = script.step()
    assert change is not None
    assert (change.range, change.tickets, change.alone) == (pages(10), (first,), first)
    script.make(change)
    script.run()
    assert len(script.take_settled()) == 1 + len(others)
    assert [script.state.state_of(pages(page)) for page in (10, *others)] == [SHARED] * (1 + len(others))


def test_a_fault_that_adjoins_a_later_one_waits_to_be_merged_with_it() -> None:
    script = Script()
    script.submit(request(0, pages(10), SHARED))
    script.submit(request(1, pages(20), SHARED))
    script.submit(request(2, pages(11), SHARED))
    script.run()
    assert [(change.range, len(change.tickets)) for change in script.changes] == [(pages(10, 2), 2), (pages(20), 1)]


def test_among_many_each_fault_is_answered_once() -> None:
    script = Script()
    tickets = [script.submit(request(vcpu, pages(6 + 2 * vcpu), SHARED)) for vcpu in range(24)]
    script.run()
    assert script.take_settled() == tickets
    assert {change.alone for change in script.changes[:16]} == {None}


def test_after_requests_that_had_to_do_with_each_other_others_are_decided_like_lone_ones_again() -> None:
    script = Script()
    # Side by side and opposite: neither merged nor decided alone.
    script.submit(request(0, pages(10), SHARED))
    script.submit(request(1, pages(11), PRIVATE))
    script.submit(request(2, pages(12), SHARED))
    first = script.rules.next_change()
    assert first is not None
    assert first.alone is None
    rounds = 0
    while True:
        # One comes with each change, as from vCPUs that are woken one by one: there are always some.
        rounds += 1
        later = script.submit(request(rounds % 3, pages(20 + 2 * rounds), SHARED))
        script.rules.commit(first, first.range.end)
        script.rules.finish(first)
        change = script.rules.next_change()
        assert change is not None
        if change.alone is not None:
            break
        first = change
    assert rounds <= 3
    assert change.alone is not later
