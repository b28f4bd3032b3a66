"""Ways of handing something from a thread to a trio task and back: kvmd's, the bare one, and those not taken."""

from __future__ import annotations

import os
import select
import threading
from collections import deque
from itertools import cycle
from queue import SimpleQueue

import trio

from kvmd.bell import Bell
from kvmd.conversion.changes import Change, Limits, Ticket
from kvmd.conversion.messages import Answer, Cause, ConversionRequest, MmioAccess, Outcome
from kvmd.conversion.ring import RecordRing
from kvmd.conversion.rules import ConversionRules
from kvmd.conversion_service import ConversionService
from kvmd.hv.exits import MemoryFault
from kvmd.memory.page_state import PageStateMap
from kvmd.protection.base import Applied
from kvmd.ranges import GpaRange, PageState
from kvmd.request_channel import SOON_NS, RequestChannel
from kvmd.units import MIB, PAGE_SIZE

BARE = "SimpleQueue ping-pong"
HANDOFF = "hand-off"

TURNS = 400
"""Hand-offs in one round: some 10 milliseconds."""

WARM_UP_TURNS = 40
RARE_TURNS = 20
RARE_SECONDS = 0.01
"""The pause before each of these: the service has gone back to its loop by then (``LINGER_SECONDS``)."""

_MEMORY = 64 * MIB


class Way:
    """One way of handing something to a trio task and back.

    Attributes:
        label: of the way.
        calls: how often it will be asked.
        cpus: where a thread of its own answers, if it has one; empty for wherever that is. trio keeps threads, and with
            them the CPUs that the way before had put them on.
    """

    label = ""
    calls = WARM_UP_TURNS + TURNS
    cpus: frozenset[int] = frozenset()

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

    def stay(self) -> None:
        """Put the calling thread on ``cpus``."""
        if self.cpus:
            os.sched_setaffinity(0, self.cpus)


# -- the yardstick -----------------------------------------------------------------------------------------------------


class _Bare(Way):
    """Two threads and two queues."""

    label = BARE

    def __init__(self) -> None:
        super().__init__()
        self._there: SimpleQueue[int] = SimpleQueue()
        self._back: SimpleQueue[int] = SimpleQueue()

    def call(self) -> None:
        self._there.put(1)
        self._back.get()

    async def serve(self, *, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        await trio.to_thread.run_sync(self._echo)

    def _echo(self) -> None:
        self.stay()
        there, back = self._there.get, self._back.put
        for _ in range(self.calls):
            there()
            back(1)


class _Bells(Way):
    """Two threads and two eventfds, which wake without the interpreter lock."""

    label = "eventfd ping-pong"

    def __init__(self) -> None:
        super().__init__()
        self._there, self._back = Bell(), Bell()

    def call(self) -> None:
        self._there.ring()
        self._back.wait()

    async def serve(self, *, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        await trio.to_thread.run_sync(self._echo)

    def _echo(self) -> None:
        self.stay()
        for _ in range(self.calls):
            self._there.wait()
            self._back.ring()

    def close(self) -> None:
        self._there.close()
        self._back.close()


# -- kvmd's service ----------------------------------------------------------------------------------------------------


class _InstantRules(ConversionRules):
    """Rules that answer each request at once."""

    _AT_ONCE = Answer(Outcome.SPURIOUS)

    def submit(self, ticket: Ticket) -> None:
        """Answer it."""
        ticket.answer = self._AT_ONCE
        self.settled.append(ticket)

    def next_change(self) -> Change | None:
        """Change nothing."""
        return None


class _Service(Way):
    """kvmd's service. Two pages take turns: one that repeats would count as stuck."""

    label = HANDOFF
    rules: type[ConversionRules] = _InstantRules
    states: tuple[PageState, ...] = (PageState.PRIVATE,)
    expected = Outcome.SPURIOUS

    def __init__(self) -> None:
        super().__init__()
        rules = self.rules(PageStateMap(_MEMORY, PageState.PRIVATE), pinned=None, limits=Limits())
        lock, self._ring = threading.Lock(), RecordRing()
        self._service = ConversionService(rules, InstantProtection(), memory_lock=lock, ring=self._ring)
        self._bell = Bell()
        self._requests = cycle(
            ConversionRequest(
                vcpu=0, cause=Cause.IMPLICIT, gpa=page * PAGE_SIZE, size_bytes=PAGE_SIZE, to=to, entered_at=0
            )
            for to in self.states
            for page in (0, 2)
        )

    def call(self) -> None:
        self._service.request(next(self._requests), self._bell)

    async def serve(self, *, task_status: trio.TaskStatus[None]) -> None:
        await self._service.run(task_status=task_status)

    def close(self) -> None:
        self._service.dispose()
        self._bell.close()
        _, records = self._ring.reader(from_oldest=True).take(self._ring.capacity)
        outcomes = [record.outcome for record in records]
        if outcomes != [self.expected] * self.calls:
            raise RuntimeError(f"expected {self.expected}, got {outcomes}")


class _Spurious(_Service):
    """kvmd's service with its rules, and pages that are in their state already."""

    label = "with rules, spurious"
    rules = ConversionRules


class _Converted(_Spurious):
    """The same with pages that change their state."""

    label = "with rules, converted"
    states = (PageState.SHARED, PageState.PRIVATE)
    expected = Outcome.CONVERTED


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

    def asks_by_address(self) -> bool:
        """Say yes."""
        return True

    def access(self, state: PageState, access: MmioAccess) -> bytes:  # noqa: ARG002 - as above
        """Answer a load with zeros."""
        return bytes(access.size) if access.data is None else b""

    def access_in_place(self, access: MmioAccess) -> bytes | None:  # noqa: ARG002 - as above
        """Make none."""
        return None

    def diagnose(self, range_: GpaRange, state: PageState) -> str:  # noqa: ARG002 - the protocol has it
        """Know nothing."""
        return ""

    def facts(self) -> dict[str, object]:
        """Say nothing."""
        return {}


# -- ways that were not taken ------------------------------------------------------------------------------------------


def _ring(bell: Bell) -> None:
    bell.ring()


class _Channel(Way):
    """kvmd's channel without the service."""

    label = "the channel alone, lingering"

    def __init__(self) -> None:
        super().__init__()
        self._channel: RequestChannel[Bell] = RequestChannel(_ring)
        self._bell = Bell()

    def call(self) -> None:
        self._channel.put(self._bell)
        self._bell.wait()

    async def serve(self, *, task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._channel.carry)
            task_status.started()
            while True:
                arrived = await self._channel.receive()
                self._channel.attend()
                while arrived:
                    for bell in arrived:
                        bell.ring()
                    arrived = self._channel.linger()
                self._channel.leave()

    def close(self) -> None:
        self._channel.close()
        self._channel.dispose()
        self._bell.close()


class _SoonChannel(Way):
    label = "run_sync_soon, channel"

    def __init__(self) -> None:
        super().__init__()
        self._token: trio.lowlevel.TrioToken | None = None
        self._send, self._receive = trio.open_memory_channel[int](64)

    def call(self) -> None:
        if self._token is not None:
            self._token.run_sync_soon(self._send.send_nowait, 1)
        self._answered.acquire()

    async def serve(self, *, task_status: trio.TaskStatus[None]) -> None:
        self._token = trio.lowlevel.current_trio_token()
        task_status.started()
        async for _ in self._receive:
            self._answered.release()


class _EventfdOnly(Way):
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
            while select.select((self._eventfd,), (), (), SOON_NS / 1e9)[0]:
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


class _FromThread(Way):
    label = "trio.from_thread.run_sync"

    def call(self) -> None:
        trio.from_thread.run_sync(int)

    async def serve(self, *, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        await trio.sleep_forever()


YARDSTICK: type[Way] = _Bare

RARE_WAYS: tuple[type[Way], ...] = (_Bare, _Service)
"""What is measured with pauses between."""

LOADED_WAYS: tuple[type[Way], ...] = (_Bare, _Service, _Converted)
"""What is measured while the loop serves."""

WAYS: tuple[type[Way], ...] = (
    _Bare,
    _Service,
    _Spurious,
    _Converted,
    _Bells,
    _FromThread,
    _Channel,
    _SoonChannel,
    _EventfdChannel,
    _EventfdOnly,
    _EventfdLinger,
)
"""The yardstick, what kvmd has, and the ways not taken."""
