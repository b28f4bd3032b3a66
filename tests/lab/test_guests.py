"""Every payload guest on private memory, and on emulated protection tripped by attributes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable

import pytest

from kvmd import hardware
from kvmd.conversion.messages import Cause, Outcome
from kvmd.errors import MissingCapability
from kvmd.kvm import uapi
from kvmd.machine import Machine
from kvmd.memory.accessor import PrivateMemory
from kvmd.protection.guest_memfd import GuestMemfdProtection
from kvmd.ranges import GpaRange, PageState
from kvmd.stop import ExitStatus, StopReason
from kvmd.units import MIB, PAGE_SIZE
from tests.machine.conftest import OpenMachine, Ran, finish

Run = Callable[..., Awaitable[Ran]]

pytestmark = [pytest.mark.kvm, pytest.mark.private_memory]

PRIVATE, SHARED = PageState.PRIVATE, PageState.SHARED
WAYS = [{"protection": "guest-memfd"}, {"protection": "emulated", "tripwire": "attribute"}]
EACH_WAY = pytest.mark.parametrize("way", WAYS, ids=["guest-memfd", "attribute"])
MEMORY = 16 * MIB


def ended_well(ran: Ran) -> bool:
    assert (ran.stop.reason, ran.stop.status) == (StopReason.GUEST_EXIT, 0), (ran.stop, ran.output)
    return True


@EACH_WAY
@pytest.mark.parametrize("vcpus", [1, 4])
async def test_hello(run: Run, way: dict[str, str], vcpus: int) -> None:
    ran = await run("hello", vcpus=vcpus, memory=MEMORY, **way)
    assert ended_well(ran)
    assert ran.output == f"hello from a machine of {vcpus} vCPUs and 16 MiB\n"


@EACH_WAY
@pytest.mark.parametrize("vcpus", [1, 2, 3, 4])
async def test_pingpong_converts_each_page_twice_a_round(run: Run, way: dict[str, str], vcpus: int) -> None:
    pages, rounds = 4, 3
    ran = await run("pingpong", pages, rounds, vcpus=vcpus, memory=MEMORY, **way)
    assert ended_well(ran)
    cause = Cause.EXPLICIT if way["protection"] == "guest-memfd" else Cause.IMPLICIT
    expected = vcpus * pages * rounds
    assert ran.converted(cause=cause, to=SHARED) == ran.converted(cause=cause, to=PRIVATE) == expected
    hit = Counter(record.gpa for record in ran.records if record.outcome is Outcome.CONVERTED)
    assert set(hit.values()) == {2 * rounds}
    assert len(hit) == vcpus * pages


@EACH_WAY
@pytest.mark.parametrize("vcpus", [1, 2, 3, 4])
async def test_contend_sees_nothing_that_it_should_not(run: Run, way: dict[str, str], vcpus: int) -> None:
    ran = await run("contend", 3, 12, vcpus=vcpus, memory=MEMORY, **way)
    assert ended_well(ran)
    assert ran.converted(cause=Cause.EXPLICIT, to=SHARED) + ran.converted(cause=Cause.IMPLICIT, to=SHARED) > 8


@EACH_WAY
@pytest.mark.parametrize("vcpus", [1, 2, 3, 4])
async def test_explicit_requests_good_and_bad(run: Run, way: dict[str, str], vcpus: int) -> None:
    ran = await run("explicit", vcpus=vcpus, memory=MEMORY, **way)
    assert ended_well(ran)
    assert {record.cause for record in ran.records} == {Cause.EXPLICIT}
    refused = [record for record in ran.records if record.outcome is Outcome.REFUSED]
    # Gigabytes outside memory, 2^52 pages, from memory into a hole: each is answered as quickly as any other.
    assert max(record.size_bytes for record in refused) >= 1 << 64
    assert {record.merged for record in refused} == {0}


@EACH_WAY
async def test_a_bad_request_costs_microseconds(run: Run, way: dict[str, str]) -> None:
    ran = await run("explicit", memory=MEMORY, **way)
    # Nothing is applied, nothing discarded: what is left is the way through the service.
    refused = [record for record in ran.records if record.outcome is Outcome.REFUSED]
    assert len(refused) > 70
    assert {(record.applying_ns, record.discarding_ns) for record in refused} == {(0, 0)}


@EACH_WAY
@pytest.mark.parametrize(("how", "vcpus"), [(0, 2), (2, 2)])
async def test_explicit_requests_by_hypercall(run: Run, way: dict[str, str], how: int, vcpus: int) -> None:
    """VMMCALL at CPL 0, which is what a kernel does: KVM_EXIT_HYPERCALL. The lab's processor is AMD's."""
    ran = await run("explicit", how, vcpus=vcpus, memory=MEMORY, cpl=0, **way)
    assert ended_well(ran)


@EACH_WAY
@pytest.mark.parametrize(
    ("case", "argument", "vcpus"), [(4, 0, 1), (9, 1, 1), (11, 2000, 1), (12, 1, 1), (15, 0, 1), (16, 2000, 4)]
)
async def test_an_odd_guest_is_borne(run: Run, way: dict[str, str], case: int, argument: int, vcpus: int) -> None:
    if case == 9 and way["protection"] == "guest-memfd":
        argument = 0  # the page is shared by then: nothing is lost
    ran = await run("hostile", case, argument, vcpus=vcpus, memory=MEMORY, **way)
    assert ended_well(ran)


@EACH_WAY
@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (1, StopReason.TRIPLE_FAULT),
        (3, StopReason.TRIPLE_FAULT),
        (6, StopReason.NO_PROGRESS),
        (7, StopReason.RESERVED_STATUS),
        (8, StopReason.PINNED_MEMORY),
        (10, StopReason.TRIPLE_FAULT),
    ],
)
async def test_a_hostile_guest_is_stopped(run: Run, way: dict[str, str], case: int, reason: StopReason) -> None:
    ran = await run("hostile", case, memory=MEMORY, **way)
    if case in {6, 8} and way["protection"] == "guest-memfd":
        assert (ran.stop.reason, ran.stop.status) == (StopReason.GUEST_EXIT, 2), "it needs two views"
        return
    assert (ran.stop.reason, ran.stop.status) == (reason, ExitStatus.GUEST_FAULT)


@EACH_WAY
async def test_a_jump_outside_memory_is_stopped(run: Run, way: dict[str, str]) -> None:
    ran = await run("hostile", 2, memory=MEMORY, **way)
    assert ran.stop.reason in {StopReason.FETCH_OUTSIDE_MEMORY, StopReason.EMULATION_FAILURE, StopReason.TRIPLE_FAULT}


@EACH_WAY
async def test_the_host_sees_shared_pages_and_no_others(open_machine: OpenMachine, way: dict[str, str]) -> None:
    machine = open_machine("hostile", 14, memory=8 * MIB, **way)
    ran = await finish(machine)
    assert ended_well(ran)
    first = machine.pinned.end
    shared = [range_ for range_, state in machine.memory_map() if state is SHARED and range_.end > first]
    # The first page of all, on a machine with one view, joins the pinned memory below it.
    assert len(shared) == -(-(8 * MIB - first) // PAGE_SIZE // 2)
    for range_ in shared[1:20]:
        assert machine.memory.read(range_.start, PAGE_SIZE) == bytes(PAGE_SIZE)
        for gpa, size in ((range_.start + PAGE_SIZE, 1), (range_.end - 1, 2)):
            with pytest.raises(PrivateMemory):
                machine.memory.read(gpa, size)
            with pytest.raises(PrivateMemory):
                machine.memory.write(gpa, bytes(size))


def without_its_memslot(open_machine: OpenMachine, guest: str, *arguments: int) -> Machine:
    machine = open_machine(guest, *arguments, memory=8 * MIB, protection="guest-memfd")
    protection = machine._hardware.protection
    assert isinstance(protection, GuestMemfdProtection)
    assert machine.facts["memslots"] == 2
    protection._vm.delete_memory_region(1)
    protection._slots.pop()
    return machine


async def test_a_fault_that_no_conversion_mends_ends_in_a_diagnosis(open_machine: OpenMachine) -> None:
    """Memory whose slot is gone: KVM reports private faults there, and private is what it is already."""
    ran = await finish(without_its_memslot(open_machine, "hostile", 12))
    assert (ran.stop.reason, ran.stop.status) == (StopReason.NO_PROGRESS, ExitStatus.GUEST_FAULT)
    assert "is private already, and the access still fails: its memslot is gone" in ran.stop.message


async def test_private_memory_without_a_guest_memfd_ends_in_a_diagnosis(open_machine: OpenMachine) -> None:
    """Its slot is made anew under the machine, and nothing stands behind its private pages any more."""
    machine = open_machine("hostile", 12, memory=8 * MIB, protection="guest-memfd")
    protection = machine._hardware.protection
    assert isinstance(protection, GuestMemfdProtection)
    range_ = protection._slots[1]
    protection._vm.delete_memory_region(1)
    protection._vm.set_memory_region(1, range_.start, range_.size_bytes, protection._shared.address_of(range_.start))
    ran = await finish(machine)
    assert (ran.stop.reason, ran.stop.status) == (StopReason.NO_PROGRESS, ExitStatus.GUEST_FAULT)
    assert "is private already, and the access still fails: its guest_memfd has no page for it" in ran.stop.message


async def test_a_private_access_to_memory_that_never_converts_ends_in_a_diagnosis(open_machine: OpenMachine) -> None:
    """An attribute that kvmd did not set, on pinned memory, whose slot has no guest_memfd."""
    machine = open_machine("hello", memory=8 * MIB, protection="guest-memfd")
    protection = machine._hardware.protection
    assert isinstance(protection, GuestMemfdProtection)
    protection._vm.set_memory_attributes(machine.pinned, uapi.KVM_MEMORY_ATTRIBUTE_PRIVATE)
    ran = await finish(machine)
    assert (ran.stop.reason, ran.stop.status) == (StopReason.PINNED_MEMORY, ExitStatus.GUEST_FAULT)
    assert ran.converted(cause=Cause.IMPLICIT, to=PRIVATE) == 0


async def test_private_memory_that_kvm_takes_for_a_device_is_no_device(open_machine: OpenMachine) -> None:
    """Shared memory without a slot is MMIO, which kvmd completes. KVM keeps that in mind when it turns private."""
    ran = await finish(without_its_memslot(open_machine, "pingpong", 1, 1))
    assert ran.stop.status == ExitStatus.GUEST_FAULT
    assert ran.stop.reason in {StopReason.EMULATION_FAILURE, StopReason.NO_PROGRESS}
    assert ran.converted(cause=Cause.EXPLICIT, to=PRIVATE) == 1


@EACH_WAY
@pytest.mark.parametrize("initial", ["private", "shared"])
async def test_memory_starts_as_it_is_told(open_machine: OpenMachine, way: dict[str, str], initial: str) -> None:
    machine: Machine = open_machine("hello", memory=8 * MIB, initial=initial, **way)
    pinned = SHARED if way["protection"] == "guest-memfd" else PRIVATE
    first = machine.pinned.end
    expected = [(GpaRange(0, first), pinned), (GpaRange(first, 8 * MIB), PageState(initial))]
    if pinned is PageState(initial):
        expected = [(GpaRange(0, 8 * MIB), pinned)]
    assert machine.memory_map() == expected
    assert ended_well(await finish(machine))
    ran = await finish(open_machine("pingpong", 2, 2, memory=8 * MIB, initial=initial, **way))
    assert ended_well(ran)


@pytest.mark.parametrize("tripwire", ["guest_memfd", "hole", "auto"])
async def test_the_other_tripwires_can_still_be_forced(run: Run, tripwire: str) -> None:
    ran = await run("pingpong", 2, 2, memory=MEMORY, tripwire=tripwire)
    assert ended_well(ran)
    assert ran.machine.facts["tripwire"] == ("attribute" if tripwire == "auto" else tripwire)


async def test_auto_is_private_memory_here_and_says_why(run: Run) -> None:
    ran = await run("pingpong", 2, 2, memory=MEMORY, protection="auto")
    assert ended_well(ran)
    assert ran.machine.facts["protection"] == "guest-memfd"
    assert str(ran.machine.facts["protection_because"]).startswith("auto: the strongest")


def test_hypercalls_that_would_not_come_out_are_an_error_at_the_start(
    open_machine: OpenMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "enable_capabilities", lambda _vm: [])
    with pytest.raises(MissingCapability, match="KVM_CAP_EXIT_HYPERCALL") as raised:
        open_machine("hello", memory=MEMORY, protection="guest-memfd")
    assert raised.value.capability == "KVM_CAP_EXIT_HYPERCALL"


async def test_none_still_converts_nothing(run: Run) -> None:
    ran = await run("hello", memory=MEMORY, protection="none")
    assert ended_well(ran)
    assert ran.machine.facts["protection"] == "none"
