"""What becomes of an exit that another vCPU's conversion overtakes, on private memory in a guest_memfd.

The handler, the service and the rules are the real ones; KVM is the fake that follows its rules, and a scripted vCPU
leaves the guest with exactly the exit in question, at exactly the moment. tests/lab/test_flipped_attributes.py has the
same from the real KVM, where the moment is a matter of luck.
"""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
import trio

from kvmd.bell import Bell
from kvmd.conversion.changes import Limits
from kvmd.conversion.hypercall import KVM_HC_MAP_GPA_RANGE
from kvmd.conversion.livelock import FIRST_SAMPLE, SAMPLE_EVERY, STUCK_AFTER
from kvmd.conversion.messages import Cause, Outcome
from kvmd.conversion.record import ConversionRecord
from kvmd.conversion.ring import RecordRing
from kvmd.conversion.rules import ConversionRules
from kvmd.conversion_service import ConversionService
from kvmd.devices.mmio import MmioCounter
from kvmd.devices.ports import PortBus
from kvmd.exit_handler import ExitHandler, Next, VcpuSurroundings
from kvmd.hv.exits import EmulationFailure, Exit, Hypercall, MemoryFault, Mmio
from kvmd.hv.vcpu import Registers
from kvmd.protection.guest_memfd import GuestMemfdProtection
from kvmd.ranges import GpaRange, PageState
from kvmd.stop import Stop, StopReason
from kvmd.units import PAGE_SIZE
from tests.fakes import FakeVcpu
from tests.protection.attribute_rig import PRIVATE, SHARED, Rig, pages
from tests.protection.fakes import ATTRIBUTE_PRIVATE

PAGE = 9
GPA = PAGE * PAGE_SIZE
MAP_PRIVATE = 1 << 4


class OneViewVcpu(FakeVcpu):
    """A vCPU without a C-bit, whose guest does nothing by itself."""

    def __init__(self, index: int) -> None:
        super().__init__(index, lambda vcpu: vcpu.spin())

    def translate(self, address: int) -> int:
        """Map every address to itself."""
        return address


@dataclass
class Board:
    """Two vCPUs of a machine on a guest_memfd: one converts, the other leaves the guest as a test says."""

    rig: Rig
    service: ConversionService
    ring: RecordRing
    vcpus: list[OneViewVcpu]
    handlers: list[ExitHandler]
    asked: list[tuple[GpaRange, int]] = field(default_factory=list)
    """The attributes that KVM was asked for since the machine stood."""

    def convert(self, to: PageState) -> None:
        """Convert the page as vCPU 0's hypercall does. In its thread, or any other but the event loop's."""
        attributes = MAP_PRIVATE if to is PRIVATE else 0
        call = Hypercall(KVM_HC_MAP_GPA_RANGE, (GPA, 1, attributes))
        assert self.handlers[0].answer(call, self.service.sequence) is Next.COMPLETE
        assert self.vcpus[0].hypercall_result == 0
        self.rig.model[PAGE], self.rig.held[PAGE] = to, 0

    @staticmethod
    def attributes_of(state: PageState) -> int:
        """Return what KVM calls the state."""
        return ATTRIBUTE_PRIVATE if state is PRIVATE else 0

    def leave(self, exit_: Exit, entered_at: int) -> object:
        """Let vCPU 1, which entered at that change, leave the guest: what its thread does next."""
        return self.handlers[1].answer(exit_, entered_at)

    def when_located(self, monkeypatch: pytest.MonkeyPatch, *to: PageState) -> None:
        """Have vCPU 0 convert at the next moment that anybody has looked what state an address is in."""
        protection = self.rig.protection
        locate, rest = protection.locate, list(to)

        def look(gpa: int) -> tuple[int, PageState | None]:
            found = locate(gpa)
            while rest:
                self.convert(rest.pop(0))
            return found

        monkeypatch.setattr(protection, "locate", look)

    def implicit(self) -> list[ConversionRecord]:
        """Return what faults asked for and got."""
        _, records = self.ring.reader(from_oldest=True).take(1 << 16)
        return [record for record in records if record.cause is Cause.IMPLICIT]


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig("guest-memfd")
    yield rig
    rig.close()


@asynccontextmanager
async def running(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Board]:
    """Run the machine's conversion service for the block."""
    assert isinstance(rig.protection, GuestMemfdProtection)
    rules = ConversionRules(rig.state, pinned=pages(0, rig.pinned), limits=Limits())
    ring = RecordRing()
    service = ConversionService(rules, rig.protection, memory_lock=rig.lock, ring=ring)
    vcpus = [OneViewVcpu(index) for index in range(2)]
    around = VcpuSurroundings(service, rig.protection, PortBus(), MmioCounter())
    bells = [Bell() for _ in vcpus]
    handlers = [ExitHandler(vcpu, around, bell) for vcpu, bell in zip(vcpus, bells, strict=True)]
    board = Board(rig, service, ring, vcpus, handlers)
    set_ = rig.vm.set_memory_attributes

    def spy(gpa_range: GpaRange, attributes: int) -> None:
        board.asked.append((gpa_range, attributes))
        set_(gpa_range, attributes)

    monkeypatch.setattr(rig.vm, "set_memory_attributes", spy)
    try:
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                await nursery.start(service.run)
                yield board
                nursery.cancel_scope.cancel()
    finally:
        service.dispose()
        for bell in bells:
            bell.close()


def fault(was: PageState) -> MemoryFault:
    """Return the exit of an access that began while the page was in that state: KVM reports what it began with."""
    return MemoryFault(GPA, PAGE_SIZE, private=was is PRIVATE)


# -- an attribute flipped in mid-fault -----------------------------------------------------------------------


@pytest.mark.parametrize("was", PageState)
@pytest.mark.parametrize("outcome", [Outcome.STALE, Outcome.SPURIOUS])
async def test_a_fault_that_conversions_overtook_changes_nothing(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, was: PageState, outcome: Outcome
) -> None:
    """Stale after one. After another one back the flag is right by now, by luck: spurious."""

    def play(board: Board) -> None:
        board.convert(was)
        entered_at = board.service.sequence
        board.convert(was.opposite)
        if outcome is Outcome.SPURIOUS:
            board.convert(was)
        rig.store(PAGE, 7)
        del board.asked[:]
        assert board.leave(fault(was), entered_at) is Next.ENTER
        assert board.asked == []
        rig.check()

    async with running(rig, monkeypatch) as board:
        await trio.to_thread.run_sync(play, board)
    assert [record.outcome for record in board.implicit()] == [outcome]


@pytest.mark.parametrize("was", PageState)
async def test_a_fault_in_the_middle_of_the_change_waits_for_it_and_is_stale(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, was: PageState
) -> None:
    """KVM has the new attribute and the service not yet the new state: the moment at which the exit does arise."""
    async with running(rig, monkeypatch) as board:
        await trio.to_thread.run_sync(board.convert, was)
        entered_at = board.service.sequence
        answers: list[object] = []
        thread = threading.Thread(target=lambda: answers.append(board.leave(fault(was), entered_at)))
        set_ = rig.vm.set_memory_attributes

        def flip(gpa_range: GpaRange, attributes: int) -> None:
            set_(gpa_range, attributes)
            requested = board.service.requested
            thread.start()
            while board.service.requested == requested:
                os.sched_yield()
            assert rig.state.segment_at(GPA).state is was

        monkeypatch.setattr(rig.vm, "set_memory_attributes", flip)
        del board.asked[:]
        await trio.to_thread.run_sync(board.convert, was.opposite)
        await trio.to_thread.run_sync(thread.join)
    assert answers == [Next.ENTER]
    assert board.asked == [(pages(PAGE, PAGE + 1), board.attributes_of(was.opposite))]
    assert [record.outcome for record in board.implicit()] == [Outcome.STALE]
    rig.check()


async def test_a_guest_that_always_loses_is_not_taken_for_stuck(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """It polls one address, with the same registers at each exit, and each exit is stale: more than any watch bears."""
    exits = 2 * (FIRST_SAMPLE + SAMPLE_EVERY + STUCK_AFTER)

    def play(board: Board) -> None:
        for number in range(exits):
            was = PRIVATE if number % 2 == 0 else SHARED
            entered_at = board.service.sequence
            board.convert(was.opposite)
            assert board.leave(fault(was), entered_at) is Next.ENTER

    async with running(rig, monkeypatch) as board:
        await trio.to_thread.run_sync(play, board)
    assert len(board.asked) == exits


async def test_a_fault_that_no_conversion_explains_is_told_in_the_end(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Private memory that is private already and still faults: converting would change nothing, for ever."""

    def play(board: Board) -> Stop:
        for _ in range(100):
            outcome = board.leave(fault(PRIVATE), board.service.sequence)
            if isinstance(outcome, Stop):
                return outcome
            assert outcome is Next.ENTER
        pytest.fail("it would go on for ever")

    async with running(rig, monkeypatch) as board:
        stop = await trio.to_thread.run_sync(play, board)
    assert stop.reason is StopReason.NO_PROGRESS
    assert "private already" in stop.message
    assert "its guest_memfd has no page for it" in stop.message
    assert board.asked == []


# -- an access that KVM leaves to kvmd -----------------------------------------------------------------------


async def test_an_access_to_shared_memory_is_made_and_asks_for_nothing(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def play(board: Board) -> None:
        board.convert(SHARED)
        del board.asked[:]
        entered_at = board.service.sequence
        assert board.leave(Mmio(GPA, 2, is_write=True, data=b"ab"), entered_at) is Next.COMPLETE
        assert board.leave(Mmio(GPA, 4, is_write=False, data=b""), entered_at) is Next.COMPLETE
        assert board.vcpus[1].read == b"ab\0\0"

    async with running(rig, monkeypatch) as board:
        await trio.to_thread.run_sync(play, board)
    assert (board.asked, board.implicit()) == ([], [])


@pytest.mark.parametrize("is_write", [False, True])
async def test_an_access_never_takes_back_a_conversion_to_private(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, *, is_write: bool
) -> None:
    """Another vCPU converts between kvmd's look at the page and the access: the page stays as the guest asked last."""
    access = Mmio(GPA, 4, is_write=is_write, data=b"abcd" if is_write else b"")

    def play(board: Board) -> object:
        board.convert(SHARED)
        board.when_located(monkeypatch, PRIVATE)
        return board.leave(access, board.service.sequence)

    async with running(rig, monkeypatch) as board:
        stop = await trio.to_thread.run_sync(play, board)
    assert isinstance(stop, Stop)
    assert stop.reason is StopReason.EMULATION_FAILURE
    assert f"an access to private memory to kvmd, which only the guest can make: gpa {GPA:#x}" in stop.message
    assert [attributes for _, attributes in board.asked] == [0, board.attributes_of(PRIVATE)]
    assert rig.backings[SHARED].read(GPA, 4) == bytes(4), "nothing is left where nobody looks"
    rig.check()


async def test_an_access_finds_a_page_that_came_back_as_it_is(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def play(board: Board) -> None:
        board.convert(SHARED)
        rig.store(PAGE, 7)
        board.when_located(monkeypatch, PRIVATE, SHARED)
        access = Mmio(GPA, 1, is_write=False, data=b"")
        assert board.leave(access, board.service.sequence) is Next.COMPLETE
        assert board.vcpus[1].read == b"\0", "converted memory reads as zeros"

    async with running(rig, monkeypatch) as board:
        await trio.to_thread.run_sync(play, board)
    assert len(board.asked) == 3


@pytest.mark.parametrize("was", PageState)
async def test_a_failed_fetch_never_takes_back_a_conversion(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, was: PageState
) -> None:
    """KVM cannot emulate what it could not fetch; in mid-change that only means: not yet."""

    def play(board: Board) -> None:
        board.convert(was)
        board.vcpus[1].current = Registers(rip=GPA)
        board.when_located(monkeypatch, was.opposite)
        del board.asked[:]
        assert board.leave(EmulationFailure(b""), board.service.sequence) is Next.ENTER

    async with running(rig, monkeypatch) as board:
        await trio.to_thread.run_sync(play, board)
    assert board.asked == [(pages(PAGE, PAGE + 1), board.attributes_of(was.opposite))]
    assert [record.outcome for record in board.implicit()] == [Outcome.STALE]
    rig.check()
