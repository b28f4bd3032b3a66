"""Every payload guest on the real KVM: what it checks itself, and what the machine says of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable

import pytest

from kvmd import hardware
from kvmd.conversion.messages import Cause, Outcome
from kvmd.memory.accessor import PrivateMemory
from kvmd.ranges import GpaRange, PageState
from kvmd.spec.conversion import ConversionSpec
from kvmd.stop import ExitStatus, StopReason
from kvmd.units import MIB, PAGE_SIZE
from tests.machine.conftest import OpenMachine, Ran, finish

Run = Callable[..., Awaitable[Ran]]

pytestmark = pytest.mark.kvm

TRIPWIRES = ["guest_memfd", "hole"]
PRIVATE, SHARED = PageState.PRIVATE, PageState.SHARED


@pytest.mark.parametrize("vcpus", [1, 2, 16])
async def test_hello(run: Run, vcpus: int) -> None:
    ran = await run("hello", vcpus=vcpus)
    assert (ran.stop.reason, ran.stop.status) == (StopReason.GUEST_EXIT, 0)
    assert ran.output == f"hello from a machine of {vcpus} vCPUs and 64 MiB\n"
    assert ran.records == []


async def test_hello_without_protection(run: Run) -> None:
    ran = await run("hello", protection="none")
    assert ran.stop.status == 0
    assert "hello" in ran.output


@pytest.mark.parametrize("tripwire", TRIPWIRES)
@pytest.mark.parametrize("vcpus", [1, 2, 4, 16])
async def test_pingpong_converts_each_page_twice_a_round_for_real_faults(run: Run, vcpus: int, tripwire: str) -> None:
    pages, rounds = 8, 4
    ran = await run("pingpong", pages, rounds, vcpus=vcpus, tripwire=tripwire)
    assert (ran.stop.reason, ran.stop.status) == (StopReason.GUEST_EXIT, 0), ran.output
    expected = vcpus * pages * rounds
    assert ran.converted(cause=Cause.IMPLICIT, to=SHARED) == expected
    assert ran.converted(cause=Cause.IMPLICIT, to=PRIVATE) == expected
    first_free = ran.machine.pinned.end
    hit = Counter(record.gpa // PAGE_SIZE for record in ran.records if record.outcome is Outcome.CONVERTED)
    assert hit == {first_free // PAGE_SIZE + page: 2 * rounds for page in range(vcpus * pages)}
    assert {record.vcpu for record in ran.records} == set(range(vcpus))
    # It ends as it began.
    assert ran.machine.memory_map() == [(GpaRange(0, 64 * MIB), PRIVATE)]


@pytest.mark.parametrize("tripwire", TRIPWIRES)
@pytest.mark.parametrize("vcpus", [1, 2, 4, 16])
async def test_contend_never_shows_a_private_byte(run: Run, vcpus: int, tripwire: str) -> None:
    ran = await run("contend", 4, 24, vcpus=vcpus, tripwire=tripwire)
    assert (ran.stop.reason, ran.stop.status) == (StopReason.GUEST_EXIT, 0), ran.output
    converted = [record for record in ran.records if record.outcome is Outcome.CONVERTED]
    assert len(converted) > 24
    # All memory is private at first; merged requests have a record each, one after the other.
    for page in {record.gpa // PAGE_SIZE for record in converted}:
        assert next(record for record in converted if record.gpa // PAGE_SIZE == page).to is SHARED
    assert [record.sequence for record in ran.records] == list(range(1, len(ran.records) + 1))


@pytest.mark.parametrize("tripwire", TRIPWIRES)
@pytest.mark.parametrize("vcpus", [1, 2, 4, 16])
async def test_explicit_requests_good_and_bad(run: Run, vcpus: int, tripwire: str) -> None:
    ran = await run("explicit", vcpus=vcpus, tripwire=tripwire)
    assert (ran.stop.reason, ran.stop.status) == (StopReason.GUEST_EXIT, 0), ran.output
    outcomes = Counter(record.outcome for record in ran.records)
    assert outcomes[Outcome.CONVERTED] > 0
    assert outcomes[Outcome.REFUSED] > 0
    whole = [record for record in ran.records if record.size_bytes == 64 * MIB - ran.machine.pinned.end]
    assert whole, "everything from the first free byte to the end was converted"
    assert {record.cause for record in ran.records} == {Cause.EXPLICIT}


@pytest.mark.parametrize("tripwire", TRIPWIRES)
async def test_memory_may_start_shared(run: Run, tripwire: str) -> None:
    ran = await run("pingpong", 3, 2, tripwire=tripwire, initial="shared")
    assert (ran.stop.reason, ran.stop.status) == (StopReason.GUEST_EXIT, 0), ran.output
    # The first touch of each page finds the shared view live.
    assert (ran.converted(cause=Cause.IMPLICIT, to=SHARED), ran.converted(cause=Cause.IMPLICIT, to=PRIVATE)) == (3, 6)
    first = ran.machine.pinned.end
    touched = first + 3 * PAGE_SIZE
    assert ran.machine.memory_map() == [(GpaRange(0, touched), PRIVATE), (GpaRange(touched, 64 * MIB), SHARED)]


async def test_conversions_at_privilege_level_0(run: Run) -> None:
    ran = await run("pingpong", 2, 2, cpl=0)
    assert (ran.stop.reason, ran.stop.status) == (StopReason.GUEST_EXIT, 0), ran.output
    assert ran.converted(cause=Cause.IMPLICIT, to=SHARED) == 4


async def test_memory_is_given_back_when_it_converts(open_machine: OpenMachine) -> None:
    """Alternating pages end shared: their private side holds no host memory, and the host may read them only."""
    machine = open_machine("hostile", 13, memory=16 * MIB)
    ran = await finish(machine)
    assert ran.stop.status == 0, ran.stop
    shared = [range_ for range_, state in machine.memory_map() if state is SHARED]
    assert len(shared) > 1000
    for range_ in shared[:50]:
        assert len(machine.memory.read(range_.start, PAGE_SIZE)) == PAGE_SIZE
        with pytest.raises(PrivateMemory):
            machine.memory.read(range_.start + PAGE_SIZE, 1)
        with pytest.raises(PrivateMemory):
            machine.memory.read(range_.end - 1, 2)
    with pytest.raises(PrivateMemory):
        machine.memory.write(machine.pinned.start, b"x")
    with pytest.raises(IndexError):
        machine.memory.read(16 * MIB, 1)


@pytest.mark.parametrize(
    ("case", "reason", "words"),
    [
        (1, StopReason.TRIPLE_FAULT, "triple fault"),
        (2, StopReason.FETCH_OUTSIDE_MEMORY, "gpa 0x4000000"),
        (3, StopReason.TRIPLE_FAULT, "triple fault"),
        (6, StopReason.NO_PROGRESS, "at the same time"),
        (7, StopReason.RESERVED_STATUS, "121"),
        (8, StopReason.PINNED_MEMORY, "gpa 0x10"),
        (10, StopReason.TRIPLE_FAULT, "triple fault"),
    ],
)
async def test_a_hostile_guest_is_stopped_with_a_named_reason(
    run: Run, case: int, reason: StopReason, words: str
) -> None:
    ran = await run("hostile", case)
    assert ran.stop.reason is reason
    assert ran.stop.status == ExitStatus.GUEST_FAULT
    assert words in ran.stop.message
    assert ran.stop.vcpu == 0
    assert ran.stop.registers is not None
    assert ran.stop.registers.rip


@pytest.mark.parametrize("tripwire", TRIPWIRES)
@pytest.mark.parametrize(("case", "vcpus"), [(4, 1), (9, 1), (12, 1), (15, 1), (16, 1), (16, 4)])
async def test_an_odd_guest_is_borne(run: Run, case: int, vcpus: int, tripwire: str) -> None:
    ran = await run("hostile", case, vcpus=vcpus, tripwire=tripwire)
    assert (ran.stop.reason, ran.stop.status) == (StopReason.GUEST_EXIT, 0), (ran.stop, ran.output)
    if case == 4:
        assert ran.machine.mmio.unclaimed > 0
        assert ran.machine.ports.unclaimed > 0
        assert all(gpa >= 64 * MIB for gpa in ran.machine.mmio.unclaimed_addresses)


async def test_code_runs_from_a_view_that_is_not_live_whatever_the_tripwire(run: Run) -> None:
    for tripwire in TRIPWIRES:
        ran = await run("hostile", 12, 1, tripwire=tripwire)
        assert ran.stop.status in {0, ExitStatus.GUEST_FAULT}
        assert ran.converted(cause=Cause.IMPLICIT, to=SHARED) >= 1


async def test_a_console_flood_ends_and_loses_nothing(run: Run) -> None:
    ran = await run("hostile", 11, 20000)
    assert ran.stop.status == 0
    assert len(ran.output) == 20000
    assert set(ran.output) == {"x", "\n"}


async def test_out_of_memslots_is_eagain_for_a_request_and_the_end_for_a_fault(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With few memslots, since all of a real KVM's take 8,000 conversions (see the slow test below)."""
    monkeypatch.setattr(hardware, "memslot_count", lambda _vm: 512)
    explicit = await run("hostile", 14)
    assert (explicit.stop.reason, explicit.stop.status) == (StopReason.GUEST_EXIT, 0)
    failed = [record for record in explicit.records if record.outcome is Outcome.FAILED]
    assert len(failed) == 1
    assert 100 < explicit.converted(cause=Cause.EXPLICIT, to=SHARED) < 256

    implicit = await run("hostile", 13)
    assert implicit.stop.reason is StopReason.MEMSLOTS_EXHAUSTED
    assert implicit.stop.status == ExitStatus.EXHAUSTED
    assert "memslot" in implicit.stop.message


async def test_alternating_pages_exhaust_the_memslots_of_a_real_kvm_at_128_mib(run: Run) -> None:
    ran = await run("hostile", 14, memory=128 * MIB)
    assert (ran.stop.reason, ran.stop.status) == (StopReason.GUEST_EXIT, 0)
    assert ran.records[-1].outcome is Outcome.FAILED
    # All others were converted, and still are.
    shared = [range_ for range_, state in ran.machine.memory_map() if state is SHARED]
    assert len(shared) == len(ran.records) - 1


async def test_a_policy_against_implicit_conversions_stops_the_guest(open_machine: OpenMachine) -> None:
    ran = await finish(open_machine("pingpong", conversion=ConversionSpec(implicit="deny")))
    assert ran.stop.reason is StopReason.IMPLICIT_DENIED
    assert ran.machine.memory_map() == [(GpaRange(0, 64 * MIB), PRIVATE)]
