"""What the daemon's API needs of the machines, whatever stands behind it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Literal, Protocol, get_args

import msgspec

from kvmd.conversion.hottest import HotRange
from kvmd.ranges import GpaRange, PageState
from kvmd.spec.machine import MachineSpec

MachineState = Literal["created", "running", "paused", "stopped"]
"""``created``: a process with memory and vCPUs that has not run yet. ``stopped``: the process is gone, but
not how it ended."""

MACHINE_STATES: tuple[MachineState, ...] = get_args(MachineState)


class MachineEnd(msgspec.Struct, frozen=True):
    """How a machine ended.

    Attributes:
        reason: a name of ``kvmd.stop.StopReason``, or ``process-died`` where the process ended without saying why.
        message: one line.
        status: the exit status, 0 to 255.
        signal: the signal that ended the process, or None.
        wall_ns: when, in nanoseconds since the epoch.
    """

    reason: str
    message: str
    status: int
    signal: int | None
    wall_ns: int


class Counters(msgspec.Struct, frozen=True):
    """What a machine did so far.

    Attributes:
        requests: by cause, direction and outcome, such as ``("implicit", "private", "converted")``.
        shared_bytes, private_bytes: of all memory, now.
        waiting_us, applying_us, discarding_us: percentiles 50, 90 and 99 and the maximum, in microseconds.
        lost: records that the ring dropped before they were counted.
        hottest: the ranges that were converted most, hottest first; a handful.
        balloon: what memory the guest does without; None where there is no balloon.
        held_back_us: how long vCPUs were kept out of the guest by ``conversion.rate``, all together, in microseconds.
    """

    requests: dict[tuple[str, str, str], int]
    shared_bytes: int
    private_bytes: int
    waiting_us: tuple[float, float, float, float]
    applying_us: tuple[float, float, float, float]
    discarding_us: tuple[float, float, float, float]
    lost: int
    hottest: tuple[HotRange, ...] = ()
    balloon: Balloon | None = None
    held_back_us: int = 0


class MemoryMap(msgspec.Struct, frozen=True):
    """The state of all memory.

    Attributes:
        ranges: the fewest that say it, in order.
        pinned: what never converts, or None.
    """

    ranges: Sequence[tuple[GpaRange, PageState]]
    pinned: GpaRange | None = None


class OutputPart(msgspec.Struct, frozen=True):
    """Some bytes of what a machine prints or logs.

    Attributes:
        start: the place of the first one, counted from the output's first byte.
        dropped: how many before them were asked for and are not kept any more.
        data: the bytes.
    """

    start: int
    dropped: int
    data: bytes

    @property
    def end(self) -> int:
        """The place after the last byte: where to go on."""
        return self.start + len(self.data)


class Balloon(msgspec.Struct, frozen=True):
    """Memory that a guest does without.

    Attributes:
        target_bytes: what it is asked for.
        actual_bytes: what it says that it does without.
        given_back_bytes: what the host has taken back so far: of the balloon, and of pages that were reported as free.
        held_bytes: what the guest's memory takes up of the host's now.
    """

    target_bytes: int
    actual_bytes: int
    given_back_bytes: int
    held_bytes: int


class MachineInfo(msgspec.Struct, frozen=True):
    """One machine as it is now.

    Attributes:
        name: unique in the daemon.
        spec: what it is made of.
        state: see ``MachineState``.
        owner_uid: whose connection created it.
        created_ns, started_ns: nanoseconds since the epoch; None where it was not started.
        pid: of its process; None once that has ended.
        facts: what its first log line says: protection, tripwire, accelerator and so on.
        end: how it ended; None while it has not.
    """

    name: str
    spec: MachineSpec
    state: MachineState
    owner_uid: int
    created_ns: int
    started_ns: int | None
    pid: int | None
    facts: dict[str, object]
    end: MachineEnd | None


class Event(msgspec.Struct, frozen=True):
    """One line of a stream.

    Attributes:
        id: a place in the stream, to be handed back as it is: a reader that comes back names the last one it saw.
            ``counters`` and ``lost`` have the id of the event before them.
        kind: ``conversion``, ``lifecycle``, ``counters`` or ``lost`` (how many the reader was too slow for).
        machine: its name.
        data: JSON object. Of a conversion, what ``kvmd.log.conversion_event`` makes; of a lifecycle event ``change``
            (``created``, ``started``, ``paused``, ``resumed``, ``stopped``, ``deleted``), ``state``, ``time`` and at
            the end ``reason``, ``message``, ``status`` and ``signal``; of counters what ``counters_document`` makes;
            of lost ``lost``, a number.
    """

    id: str
    kind: str
    machine: str
    data: dict[str, object]


class EventStream(Protocol):
    """Events as they come."""

    @property
    def place(self) -> str | None:
        """The id before the first event that is still to come: a reader that has seen none comes back with it.

        None where that is not known yet.
        """

    def __aiter__(self) -> AsyncIterator[Event]:
        """Return itself."""

    async def __anext__(self) -> Event:
        """Return the next event."""


class Console(Protocol):
    """A connection to a machine's console, or to the agent in its guest, both ways."""

    async def receive(self) -> bytes:
        """Return the next output; empty at the machine's end."""

    async def send(self, data: bytes) -> None:
        """Give the guest input; waits while the guest does not take it.

        Raises:
            MachineStateError: the machine has ended.
        """


class Fleet(Protocol):
    """All machines of a daemon.

    Raises, where a method says nothing else:
        UnknownMachine: there is none of that name.
        MachineStateError: the action needs another state; says which it needs and which it found.
    """

    def machines(self) -> Sequence[MachineInfo]:
        """Return all of them, by name."""

    def machine(self, name: str) -> MachineInfo:
        """Return one."""

    async def create(
        self, spec: MachineSpec, *, owner_uid: int, files: Sequence[int] = (), any_name: bool = False
    ) -> MachineInfo:
        """Make a machine's process, with memory and vCPUs, not running yet.

        Args:
            spec: of a name that is free. (A spec always has one: without another, its image's.)
            owner_uid: who asked.
            files: open ones in place of those that the spec names (``spec.files``), one for each, in their order; or
                none. The caller closes them.
            any_name: where the name is taken, use it with a number after it.

        Raises:
            MachineExists: the name is taken.
            KvmdError: as ``Machine.open``; nothing is left behind.
        """

    async def delete(self, name: str) -> None:
        """Forget a machine that is created or stopped; a created one's process is ended."""

    async def start(self, name: str) -> MachineInfo:
        """Run a created machine."""

    async def pause(self, name: str) -> MachineInfo:
        """Take a running machine's vCPUs out of the guest."""

    async def resume(self, name: str) -> MachineInfo:
        """Let a paused machine's vCPUs in again."""

    async def stop(self, name: str) -> MachineInfo:
        """Ask a running or paused machine to stop, and wait until it has.

        Who asks while another waits sees the same end; who asks later, MachineStateError.
        """

    async def press_power_button(self, name: str) -> MachineInfo:
        """Ask a running machine's guest to shut down, and do not wait for what it does.

        Raises NoSuchDevice where there is no button.
        """

    async def balloon(self, name: str) -> Balloon:
        """Return what memory a guest does without. Raises NoSuchDevice where there is no balloon."""

    async def set_balloon(self, name: str, target_bytes: int) -> Balloon:
        """Ask a guest to do without so much memory; it takes its time, and may not.

        Raises NoSuchDevice where there is no balloon, ValueError where the target is impossible.
        """

    async def kill(self, name: str) -> MachineInfo:
        """End a machine's process at once, whatever state it is in but stopped."""

    async def wait(self, name: str, states: frozenset[MachineState]) -> MachineInfo:
        """Wait until the machine is in one of the states. The caller sets the deadline.

        Raises:
            UnknownMachine: there is none of that name, or no longer.
        """

    async def counters(self, name: str) -> Counters:
        """Return what the machine did so far; of a stopped one, at its end."""

    async def memory_map(self, name: str) -> MemoryMap:
        """Return the state of all memory."""

    async def read_memory(self, name: str, gpa: int, size_bytes: int) -> bytes:
        """Return shared memory. Raises PrivateMemory where a page of it is private, ValueError outside memory."""

    async def conversions(self, name: str, *, since: int, limit: int) -> Sequence[dict[str, object]]:
        """Return the recent conversions with a sequence above ``since``, oldest first, at most ``limit``."""

    async def last_conversion(self, name: str) -> int:
        """Return the sequence of the last conversion; 0 where there was none."""

    def events(self, name: str | None, *, last_id: str | None) -> AbstractAsyncContextManager[EventStream]:
        """Stream what happens to one machine, or to all.

        Without ``last_id`` from now on; else from after that event, as far back as is kept, with a ``lost`` where
        something is missing. One machine's stream ends with its machine.

        Raises (on entering):
            ValueError: ``last_id`` was never an id of this stream.
        """

    def console(self, name: str) -> AbstractAsyncContextManager[Console]:
        """Attach to a machine's console: what it printed lately comes first."""

    def agent(self, name: str) -> AbstractAsyncContextManager[Console]:
        """Talk to the program in a machine's guest that has its port; nobody else does meanwhile.

        Raises (on entering):
            NoSuchDevice: the machine has no port for an agent.
            DeviceInUse: somebody else talks to it.
        """

    def console_output(
        self, name: str, *, start: int = 0, follow: bool = True
    ) -> AbstractAsyncContextManager[AsyncIterator[OutputPart]]:
        """Read what a machine prints.

        Args:
            name: the machine's.
            start: the place to begin at, or as near after it as is kept; one beyond the end is the end.
            follow: go on with what comes, to the machine's end; else end with what there is now.
        """

    def log_output(
        self, name: str, *, start: int = 0, follow: bool = True
    ) -> AbstractAsyncContextManager[AsyncIterator[OutputPart]]:
        """Read what a machine's process logs, as lines of JSON; the rest as ``console_output``."""


def state_of(told: str) -> MachineState:
    """Return the state that a machine's process tells; "running" for one that is none of a process that is there.

    A machine whose guest has stopped is not over before its process is, and of one that says nonsense nobody knows
    more: that lets the operator stop and kill it.
    """
    return next((state for state in MACHINE_STATES if state == told and state != "stopped"), "running")


def counters_document(counters: Counters) -> dict[str, object]:
    """Return counters as JSON has them, in the stream and elsewhere: the fields of ``Counters``, with names.

    The balloon is left out: it is a resource of its own.

    Latencies have ``p50``, ``p90``, ``p99`` and ``max``; requests ``cause``, ``to``, ``outcome`` and ``count``; the
    hottest ranges ``gpa``, ``size``, ``count`` and ``overcount``.
    """
    return {
        "requests": [
            {"cause": cause, "to": to, "outcome": outcome, "count": count}
            for (cause, to, outcome), count in sorted(counters.requests.items())
        ],
        "shared_bytes": counters.shared_bytes,
        "private_bytes": counters.private_bytes,
        "waiting_us": _latency(counters.waiting_us),
        "applying_us": _latency(counters.applying_us),
        "discarding_us": _latency(counters.discarding_us),
        "held_back_us": counters.held_back_us,
        "lost": counters.lost,
        "hottest": [
            {"gpa": hex(hot.gpa), "size": hot.size_bytes, "count": hot.count, "overcount": hot.overcount}
            for hot in counters.hottest
        ],
    }


def _latency(values: tuple[float, float, float, float]) -> dict[str, float]:
    return dict(zip(("p50", "p90", "p99", "max"), values, strict=True))
