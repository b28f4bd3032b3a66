"""vCPU threads under trio, with guests that are Python functions."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable

import pytest
import trio

from kvmd import run_gate, vcpu_tasks
from kvmd.bell import Bell
from kvmd.conversion.messages import Answer, ConversionRequest, Outcome
from kvmd.conversion.rate_limit import RateLimit
from kvmd.devices.mmio import MmioCounter
from kvmd.devices.ports import PortBus
from kvmd.errors import BackendError
from kvmd.exit_handler import EXIT_PORT, VcpuSurroundings
from kvmd.hv.exits import Exit, Interrupted, MemoryFault, PortIo, Shutdown
from kvmd.hv.vcpu import Vcpu
from kvmd.stop import Stop, StopReason
from kvmd.units import MIB, PAGE_SIZE
from kvmd.vcpu_tasks import VcpuTasks
from tests.fakes import FakeVcpu, RecordingProtection

OPERATOR = Stop.because(StopReason.OPERATOR, "enough")
MOST_SECONDS = 60.0
"""How long what must come may take."""


class IdleService:
    """Answers at once: these guests convert nothing that matters."""

    sequence = 0

    def request(self, request: ConversionRequest, bell: Bell) -> Answer:
        """Say that it is done."""
        assert request.vcpu >= 0
        assert bell is not None
        return Answer(Outcome.CONVERTED)


def leave(status: int) -> PortIo:
    """Return the exit of a guest that ends its vCPU."""
    return PortIo(EXIT_PORT, 1, 1, is_write=True, data=bytes([status]))


class Rig:
    """vCPUs behind a gate, and what the tasks told their surroundings."""

    def __init__(self, *guests: Callable[[FakeVcpu], Exit], rate: RateLimit | None = None) -> None:
        self.parked = threading.Event()
        self.gate = run_gate.RunGate(self.parked.set)
        self.vcpus = [FakeVcpu(index, guest) for index, guest in enumerate(guests)]
        self.stopping: list[Stop] = []
        around = VcpuSurroundings(IdleService(), RecordingProtection(MIB), PortBus(), MmioCounter(), rate=rate)
        handles: list[Vcpu] = list(self.vcpus)
        self.tasks = VcpuTasks(handles, self.gate, around, self.stopping.append)

    async def pause(self) -> None:
        """Pause, and wait until every vCPU is parked."""
        self.parked.clear()
        self.gate.pause()
        await trio.to_thread.run_sync(self.parked.wait)


async def test_the_machine_ends_with_the_highest_status_when_all_vcpus_have_ended() -> None:
    rig = Rig(lambda _: leave(3), lambda _: leave(200), lambda _: leave(0))
    stop = await rig.tasks.run()
    assert (stop.reason, stop.status) == (StopReason.GUEST_EXIT, 200)
    assert all(vcpu.released.is_set() for vcpu in rig.vcpus)


async def test_64_vcpus_run_at_the_same_time() -> None:
    everybody = threading.Barrier(64)

    def meet(_: FakeVcpu) -> Exit:
        everybody.wait(timeout=60)
        return leave(0)

    assert (await Rig(*[meet] * 64).tasks.run()).status == 0


async def test_a_fatal_exit_of_one_vcpu_stops_the_others() -> None:
    rig = Rig(lambda vcpu: vcpu.spin(), lambda _: Shutdown(), lambda vcpu: vcpu.spin())
    stop = await rig.tasks.run()
    assert (stop.reason, stop.vcpu) == (StopReason.TRIPLE_FAULT, 1)
    assert [stop.reason for stop in rig.stopping] == [StopReason.TRIPLE_FAULT]


async def test_a_vcpu_that_is_held_back_does_not_enter_pauses_and_stops() -> None:
    rate = RateLimit(1)
    rate.count(1 << 62)  # until the end of time
    faulted, spins = threading.Event(), threading.Event()

    def fault_once(vcpu: FakeVcpu) -> Exit:
        if vcpu.entries > 1:
            return leave(1)
        faulted.set()
        return MemoryFault(0, PAGE_SIZE, private=False)

    def spin(vcpu: FakeVcpu) -> Exit:
        spins.set()
        return vcpu.spin()

    rig = Rig(fault_once, spin, rate=rate)
    async with trio.open_nursery() as nursery:

        async def command() -> None:
            await trio.to_thread.run_sync(faulted.wait)
            await trio.to_thread.run_sync(spins.wait)
            await rig.pause()
            spins.clear()
            rig.gate.resume()
            assert await trio.to_thread.run_sync(spins.wait, MOST_SECONDS), "the others go on"
            await rig.pause()
            assert rig.vcpus[0].entries == 1
            rig.tasks.stop(OPERATOR)

        nursery.start_soon(command)
        assert await rig.tasks.run() is OPERATOR
    assert rig.vcpus[0].entries == 1


async def test_a_vcpu_whose_time_has_come_enters_again() -> None:
    rate = RateLimit(1_000_000)
    rate.count(0)
    rig = Rig(lambda vcpu: leave(7) if vcpu.entries > 1 else MemoryFault(0, PAGE_SIZE, private=False), rate=rate)
    assert (await rig.tasks.run()).status == 7


async def test_the_operator_stops_a_guest_that_spins() -> None:
    entered = threading.Event()

    def spin(vcpu: FakeVcpu) -> Exit:
        entered.set()
        return vcpu.spin()

    rig = Rig(spin)
    async with trio.open_nursery() as nursery:

        async def stop_it() -> None:
            await trio.to_thread.run_sync(entered.wait)
            rig.tasks.stop(OPERATOR)
            rig.tasks.stop(Stop.because(StopReason.BUG, "too late: the first counts"))

        nursery.start_soon(stop_it)
        assert await rig.tasks.run() is OPERATOR


async def test_cancelling_stops_the_vcpus_first() -> None:
    rig = Rig(*[lambda vcpu: vcpu.spin()] * 3)
    with trio.CancelScope() as scope:
        scope.cancel()
        await rig.tasks.run()
    assert all(vcpu.released.is_set() for vcpu in rig.vcpus)
    assert rig.stopping


async def test_a_backend_failure_is_a_stop_with_its_message() -> None:
    def fail(_: FakeVcpu) -> Exit:
        raise BackendError("KVM_RUN: Input/output error", 5)

    stop = await Rig(fail).tasks.run()
    assert (stop.reason, stop.message, stop.vcpu) == (StopReason.BACKEND_FAILED, "KVM_RUN: Input/output error", 0)


async def test_a_vcpu_without_a_descriptor_to_wait_at_is_a_stop_that_says_what_to_raise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_value: int, _flags: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    rig = Rig(lambda _: leave(0), lambda _: leave(0))
    monkeypatch.setattr(os, "eventfd", fail)
    stop = await rig.tasks.run()
    assert stop.reason is StopReason.BACKEND_FAILED
    assert stop.message.endswith("Too many open files; raise LimitNOFILE=")
    assert all(vcpu.released.is_set() for vcpu in rig.vcpus)


async def test_a_bug_in_a_vcpu_thread_ends_its_machine_not_the_process() -> None:
    def fail(_: FakeVcpu) -> Exit:
        raise ZeroDivisionError

    stop = await Rig(fail, lambda vcpu: vcpu.spin()).tasks.run()
    assert stop.reason is StopReason.BUG
    assert "ZeroDivisionError" in stop.message


async def test_a_vcpu_that_never_comes_out_is_given_up_and_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vcpu_tasks, "STOP_DEADLINE_SECONDS", 0.05)
    entered, release = threading.Event(), threading.Event()

    def stuck(_: FakeVcpu) -> Exit:
        entered.set()
        release.wait()
        return Interrupted()

    rig = Rig(stuck)
    async with trio.open_nursery() as nursery:

        async def stop_it() -> None:
            await trio.to_thread.run_sync(entered.wait)
            rig.tasks.stop(OPERATOR)

        nursery.start_soon(stop_it)
        stop = await rig.tasks.run()
    assert stop.reason is StopReason.VCPU_STUCK
    assert "enough" in stop.message
    assert rig.tasks.abandoned
    release.set()
    await trio.to_thread.run_sync(rig.vcpus[0].released.wait)


async def test_pause_completes_pending_io_before_it_is_reported() -> None:
    steps: list[str] = []
    first_read = threading.Event()

    def guest(vcpu: FakeVcpu) -> Exit:
        # What KVM does: the read of the exit before is finished by this entry, before a requested exit is honoured.
        if vcpu.read is not None:
            steps.append("completed")
            vcpu.read = None
            if vcpu._wanted_out.is_set():
                return Interrupted()
        steps.append("read")
        first_read.set()
        paused_now.wait()
        return PortIo(0x80, 1, 1, is_write=False, data=b"")

    paused_now = threading.Event()
    rig = Rig(guest)
    vcpu = rig.vcpus[0]
    # This guest completes I/O even when it is to leave, so the fake must not answer for it.
    vcpu.run = lambda: guest(vcpu)  # type: ignore[method-assign]  # as said
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.tasks.run)
        await trio.to_thread.run_sync(first_read.wait)
        rig.parked.clear()
        rig.gate.pause()
        assert not rig.parked.is_set()
        paused_now.set()
        await trio.to_thread.run_sync(rig.parked.wait)
        assert steps == ["read", "completed"]
        rig.tasks.stop(OPERATOR)


async def test_pause_and_resume_at_any_moment_lose_nothing() -> None:
    """A kick storm: 4 vCPUs that count, again and again paused, kicked, taken out and let in again."""
    counts = [0] * 4
    enough = threading.Event()

    def count(vcpu: FakeVcpu) -> Exit:
        counts[vcpu.index] += 1
        if enough.is_set():
            return leave(0)
        return PortIo(0x80, 1, 1, is_write=bool(counts[vcpu.index] % 2), data=b"x" * (counts[vcpu.index] % 2))

    rig = Rig(*[count] * 4)
    stops: list[Stop] = []
    async with trio.open_nursery() as nursery:

        async def run() -> None:
            stops.append(await rig.tasks.run())

        nursery.start_soon(run)
        for _ in range(80):
            await rig.pause()
            seen = list(counts)
            assert not any(vcpu.inside for vcpu in rig.vcpus)
            rig.gate.kick_all()
            with rig.gate.quiesce():
                assert counts == seen, "a paused vCPU does not run"
            rig.gate.resume()
            with rig.gate.quiesce():
                assert not any(vcpu.inside for vcpu in rig.vcpus)
            # Nobody is lost: each of them goes on counting before the next pause.
            while any(now == before for now, before in zip(counts, seen, strict=True)):
                await trio.lowlevel.checkpoint()
        enough.set()
    assert stops[0].reason is StopReason.GUEST_EXIT
    assert all(vcpu.released.is_set() for vcpu in rig.vcpus)
