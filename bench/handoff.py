"""A request's way from a vCPU's thread through the conversion service and back.

Beside it a bare ping-pong of two threads over ``queue.SimpleQueue``: the least that Python pays for waking a thread
and being woken by it. Then some ways to hand over that were not taken, without any rules behind them.

All of them run in one process, beside an event loop that sleeps where it is not part of what is measured. Where the two
threads are matters more than anything else, so it is fixed: both on one CPU, where waking a thread is only a switch
to it, or on two, where it is an interrupt to a CPU that sleeps (dear in a virtual machine).
"""

from __future__ import annotations

import math
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from queue import SimpleQueue

import trio

from bench.measure import Options, Ratio, Report, Series, take_turns
from kvmd.conversion.changes import Limits
from kvmd.conversion.messages import Answer, Cause, ConversionRequest, MmioAccess, Outcome
from kvmd.conversion.ring import RecordRing
from kvmd.conversion.rules import ConversionRules
from kvmd.conversion_service import TURN_SECONDS, ConversionService, Waiter
from kvmd.hv.exits import MemoryFault
from kvmd.memory.page_state import PageStateMap
from kvmd.protection.base import Applied
from kvmd.ranges import GpaRange, PageState
from kvmd.request_door import RequestDoor
from kvmd.stop import Stop, StopReason
from kvmd.units import MIB, PAGE_SIZE

TARGET = 2.0
"""What a hand-off may cost at most, in bare ping-pongs."""

_BARE = "SimpleQueue ping-pong"
_MEMORY = 64 * MIB
_LINGER_SECONDS = 0.0003
_TURNS = 200
"""Hand-offs in one round: some 10 milliseconds."""


class InstantProtection:
    """A protection that does nothing, so that only the way to it is measured."""

    def locate(self, gpa: int) -> tuple[int, PageState | None]:
        """Say that all is private."""
        return gpa, PageState.PRIVATE

    def wanted(self, fault: MemoryFault) -> tuple[int, PageState]:
        """Say what the flags say."""
        return fault.gpa, PageState.PRIVATE if fault.private else PageState.SHARED

    def apply(self, range_: GpaRange, to: PageState) -> Applied:  # noqa: ARG002 - the protocol has it
        """Say that it is done."""
        return Applied(range_.end)

    def discard(self, range_: GpaRange, side: PageState) -> None:
        """Do nothing."""

    def can_access(self, state: PageState) -> bool:  # noqa: ARG002 - as above
        """Say yes."""
        return True

    def access(self, state: PageState, access: MmioAccess) -> bytes:  # noqa: ARG002 - as above
        """Answer a load with zeros."""
        return bytes(access.size) if access.data is None else b""

    def diagnose(self, range_: GpaRange, state: PageState) -> str:  # noqa: ARG002 - the protocol has it
        """Know nothing."""
        return ""

    def facts(self) -> dict[str, object]:
        """Say nothing."""
        return {}


def measure(options: Options) -> Report:
    """Measure all ways of handing over."""
    report = Report("handoff", "from a vCPU's thread to the service and back")
    cpus = sorted(os.sched_getaffinity(0))
    for where, asking, answering in (("one CPU", cpus[0], cpus[0]), ("two CPUs", cpus[0], cpus[-1])):
        if where == "two CPUs" and asking == answering:
            continue
        series = trio.run(_measure, options, asking, answering)
        bare = series.pop(_BARE)
        for label, measured in series.items():
            target = TARGET if label.startswith("service") else None
            report.ratios.append(Ratio(replace(measured, label=f"{label}, {where}"), bare, target))
    os.sched_setaffinity(0, cpus)
    report.notes.append(
        f"{_TURNS} hand-offs a round, one thread asking; `service` is kvmd's ConversionService with a protection that "
        "does nothing, the others hand over and answer without any rules or records"
    )
    return report


async def _measure(options: Options, asking: int, answering: int) -> dict[str, Series]:
    """Measure with the asking thread on one CPU and the answering one on another, or the same."""
    token = trio.lowlevel.current_trio_token()
    os.sched_setaffinity(0, {answering})
    async with trio.open_nursery() as nursery:
        service = _service()
        await nursery.start(service.run)
        wires = [_Door(), _SoonChannel(token), _EventfdChannel(), _EventfdOnly(), _EventfdLinger()]
        for wire in wires:
            await nursery.start(wire.serve)
        things: dict[str, Callable[[], float]] = {
            _BARE: lambda: _pingpong(answering),
            "service, spurious": lambda: _ask(service, (PageState.PRIVATE, PageState.PRIVATE), Outcome.SPURIOUS),
            "service, converted": lambda: _ask(service, (PageState.SHARED, PageState.PRIVATE), Outcome.CONVERTED),
            "trio.from_thread.run_sync": lambda: _timed(lambda: trio.from_thread.run_sync(int, trio_token=token)),
            **{wire.label: _caller(wire) for wire in wires},
        }
        series = await trio.to_thread.run_sync(_rounds, things, options, asking)
        service.close(Stop.because(StopReason.OPERATOR, "measured"))
        nursery.cancel_scope.cancel()
    service.dispose()
    for wire in wires:
        wire.close()
    return series


def _rounds(things: dict[str, Callable[[], float]], options: Options, asking: int) -> dict[str, Series]:
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {asking})
    try:
        return take_turns(things, rounds=options.rounds(60), unit="us")
    finally:
        os.sched_setaffinity(0, cpus)


def _timed(call: Callable[[], object]) -> float:
    """Return microseconds for one of ``_TURNS`` calls."""
    started_ns = time.perf_counter_ns()
    for _ in range(_TURNS):
        call()
    return (time.perf_counter_ns() - started_ns) / 1000 / _TURNS


# -- the yardstick -----------------------------------------------------------------------------------------------------


def _pingpong(answering: int) -> float:
    with _echo(answering) as (there, back):

        def turn() -> None:
            there.put(1)
            back.get()

        return _timed(turn)


@contextmanager
def _echo(cpu: int) -> Iterator[tuple[SimpleQueue[int], SimpleQueue[int]]]:
    there: SimpleQueue[int] = SimpleQueue()
    back: SimpleQueue[int] = SimpleQueue()

    def answer() -> None:
        os.sched_setaffinity(0, {cpu})
        while there.get():
            back.put(1)

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        yield there, back
    finally:
        there.put(0)
        thread.join()


# -- kvmd's service ----------------------------------------------------------------------------------------------------


def _service() -> ConversionService:
    rules = ConversionRules(PageStateMap(_MEMORY, PageState.PRIVATE), pinned=None, limits=Limits())
    return ConversionService(
        rules,
        InstantProtection(),
        memory_lock=threading.Lock(),
        ring=RecordRing(),
    )


def _ask(service: ConversionService, states: tuple[PageState, PageState], expected: Outcome) -> float:
    """Return microseconds for one request, two pages taking turns: one that repeats would count as stuck."""
    requests = [
        ConversionRequest(
            vcpu=0, cause=Cause.IMPLICIT, gpa=page * PAGE_SIZE, size_bytes=PAGE_SIZE, to=to, entered_at=service.sequence
        )
        for to in states
        for page in (0, 2)
    ]
    waiter = Waiter()
    answers = []
    started_ns = time.perf_counter_ns()
    for _ in range(_TURNS // len(requests)):
        for request in requests:
            answers.append(service.request(request, waiter))  # noqa: PERF401 - the call is what is measured
    ended_ns = time.perf_counter_ns()
    if {answer.outcome for answer in answers} != {expected}:
        raise RuntimeError(f"expected {expected}, got {[answer.outcome for answer in answers]}")
    return (ended_ns - started_ns) / 1000 / len(answers)


# -- ways that were not taken ------------------------------------------------------------------------------------------


class _Wire:
    """One way of handing a number to a trio task; answered through a lock that wakes just the asking thread."""

    label = ""

    def __init__(self) -> None:
        self._answered = threading.Lock()
        self._answered.acquire()

    def call(self) -> None:
        """Hand over, and block until answered. In the asking thread."""
        raise NotImplementedError

    async def serve(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Answer until cancelled."""
        raise NotImplementedError

    def close(self) -> None:
        """Give up what it holds."""


class _Door(_Wire):
    """kvmd's door without rules or records. While it lingers, the porter task and the channel are passed by."""

    label = "door alone, lingering"

    def __init__(self) -> None:
        super().__init__()
        self._door: RequestDoor[Waiter] = RequestDoor()
        self._waiter = Waiter()
        self._answer = Answer(Outcome.CONVERTED)

    def call(self) -> None:
        self._door.put(self._waiter)
        self._waiter.wait()

    async def serve(self, *, task_status: trio.TaskStatus[None]) -> None:
        send, receive = trio.open_memory_channel[list[Waiter]](math.inf)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._carry, send)
            task_status.started()
            async for arrived in receive:
                turn_ends = time.monotonic() + TURN_SECONDS
                while arrived:
                    for waiter in arrived:
                        waiter.answer(self._answer)
                    left = turn_ends - time.monotonic()
                    if left <= 0:
                        await trio.lowlevel.checkpoint()
                        left = TURN_SECONDS
                        turn_ends = time.monotonic() + left
                    arrived = self._door.linger(left)  # noqa: PLW2901 - the same as what the channel brought

    async def _carry(self, send: trio.MemorySendChannel[list[Waiter]]) -> None:
        while True:
            send.send_nowait(await self._door.wait())

    def close(self) -> None:
        self._door.dispose()


class _SoonChannel(_Wire):
    label = "run_sync_soon, channel"

    def __init__(self, token: trio.lowlevel.TrioToken) -> None:
        super().__init__()
        self._token = token
        self._send, self._receive = trio.open_memory_channel[int](64)

    def call(self) -> None:
        self._token.run_sync_soon(self._send.send_nowait, 1)
        self._answered.acquire()

    async def serve(self, *, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        async for _ in self._receive:
            self._answered.release()


class _EventfdOnly(_Wire):
    label = "eventfd, no channel"

    def __init__(self) -> None:
        super().__init__()
        self._inbox: deque[int] = deque()
        self._eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def call(self) -> None:
        self._inbox.append(1)
        os.eventfd_write(self._eventfd, 1)
        self._answered.acquire()

    async def serve(self, *, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        while True:
            await trio.lowlevel.wait_readable(self._eventfd)
            os.eventfd_read(self._eventfd)
            while self._inbox:
                self._inbox.popleft()
                self._answered.release()

    def close(self) -> None:
        os.close(self._eventfd)


class _EventfdLinger(_EventfdOnly):
    label = "eventfd, loop lingers in select"

    async def serve(self, *, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        while True:
            await trio.lowlevel.wait_readable(self._eventfd)
            # The loop is kept for as long as the next request comes soon: no other task of it runs meanwhile.
            while select.select((self._eventfd,), (), (), _LINGER_SECONDS)[0]:
                os.eventfd_read(self._eventfd)
                while self._inbox:
                    self._inbox.popleft()
                    self._answered.release()


class _EventfdChannel(_EventfdOnly):
    label = "eventfd, channel"

    async def serve(self, *, task_status: trio.TaskStatus[None]) -> None:
        send, receive = trio.open_memory_channel[int](64)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._carry, send)
            task_status.started()
            async for _ in receive:
                self._answered.release()

    async def _carry(self, send: trio.MemorySendChannel[int]) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._eventfd)
            os.eventfd_read(self._eventfd)
            while self._inbox:
                send.send_nowait(self._inbox.popleft())


def _caller(wire: _Wire) -> Callable[[], float]:
    return lambda: _timed(wire.call)
