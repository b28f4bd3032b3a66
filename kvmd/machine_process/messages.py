"""What is said on a machine's control socket.

A Unix stream socket, ``control`` in the machine's folder, mode 0600 in a folder of mode 0700: who can connect may do
everything. Each message is a length (4 bytes, big-endian) and as many bytes of MessagePack.

The machine speaks first, with a ``Greeting``. Then the client asks, and each request is answered by one message before
the next is read; what cannot be done is answered by ``Refused`` and the connection goes on. ``FollowOutput`` and
``FollowEvents`` are answered by any number of messages until one side hangs up: the machine does at its end, and the
rest is in its folder then. After ``AttachAgent`` both sides speak when they have something to say. A message that is
too long, or is none, is answered by ``Refused`` of the kind ``bad-request``, and the connection closed.

A client that reads slowly holds up nobody but itself: outputs and conversions go on in bounded buffers, and what was
dropped meanwhile is counted in the next message.

``PROTOCOL`` grows when a message changes its meaning; new messages and new fields with a default do not change it. A
client that does not know the number may only read the greeting, wait for the process's end, and kill it.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from kvmd.conversion.record import ConversionRecord
from kvmd.machine_process.lifecycle import LifecycleEvent
from kvmd.spec.machine import MachineSpec

PROTOCOL = 1

REQUEST_LIMIT = 64 << 10
"""Bytes of a request, at most."""

ANSWER_LIMIT = 16 << 20
"""Bytes of an answer, at most."""

READ_LIMIT = 1 << 20
"""Bytes of guest memory that one request reads, at most."""

RECORDS_LIMIT = 4096
"""Conversions that one answer holds, at most."""

TYPE_LIMIT = 4096
"""Bytes of console input in one request, at most."""

AGENT_PIECE = 32 << 10
"""Bytes for an agent in one request, at most."""

OUTPUT_PIECE = 64 << 10
"""Bytes of output in one answer, at most."""

Output = Literal["console", "log"]


class Greeting(msgspec.Struct, frozen=True, tag="greeting"):
    """The machine's first words.

    Attributes:
        protocol: see ``PROTOCOL``.
        machine: its name.
        pid: of its process.
        start_ticks: when that started: field 22 of /proc/pid/stat, which tells it from a later one with its number.
    """

    protocol: int
    machine: str
    pid: int
    start_ticks: int


# -- requests ------------------------------------------------------------------------------------------------


class AskInfo(msgspec.Struct, frozen=True, tag="info"):
    """What is it, and in which state? Answered by ``Info``."""


class AskStart(msgspec.Struct, frozen=True, tag="start"):
    """Run the guest. Answered by ``Status``."""


class AskPause(msgspec.Struct, frozen=True, tag="pause"):
    """Take the vCPUs out of the guest. Answered by ``Status`` once they are."""


class AskResume(msgspec.Struct, frozen=True, tag="resume"):
    """Let the vCPUs in again. Answered by ``Status``."""


class AskStop(msgspec.Struct, frozen=True, tag="stop"):
    """Stop the guest. Answered by ``Status`` at once: the end is seen as the end of the process."""


class AskCounters(msgspec.Struct, frozen=True, tag="counters"):
    """What did it do so far? Answered by ``CounterValues``."""


class AskMap(msgspec.Struct, frozen=True, tag="map"):
    """Which memory is shared? Answered by ``MemoryMap``."""


class AskMemory(msgspec.Struct, frozen=True, tag="memory"):
    """What is in ``size_bytes`` (at most ``READ_LIMIT``) of shared memory from ``gpa`` on? Answered by ``Memory``."""

    gpa: int
    size_bytes: int


class AskConversions(msgspec.Struct, frozen=True, tag="conversions"):
    """Which conversions came after the one of sequence ``since``? Answered by ``Conversions``."""

    since: int
    limit: int


class Type(msgspec.Struct, frozen=True, tag="type"):
    """Give ``data`` (at most ``TYPE_LIMIT`` bytes) to the console's input. Answered by ``Typed`` once it is all in."""

    data: bytes


class FollowOutput(msgspec.Struct, frozen=True, tag="follow-output"):
    """Send an output from the byte at ``offset`` on: ``OutputPiece`` after ``OutputPiece``.

    Attributes:
        output: which one.
        offset: the place to begin at.
        follow: go on with what comes; else one piece without data comes after the last that there is now.
    """

    output: Output
    offset: int
    follow: bool = True


class FollowEvents(msgspec.Struct, frozen=True, tag="follow-events"):
    """Send lifecycle events and conversions from after a place on, as they come: ``EventBatch`` after ``EventBatch``.

    Attributes:
        lifecycle: number of the last lifecycle event that is known; None: what there is now is.
        conversion: sequence of the last conversion that is known; None the same.
        counters: send ``CounterValues`` once a second as well.
    """

    lifecycle: int | None = None
    conversion: int | None = None
    counters: bool = False


class PressPowerButton(msgspec.Struct, frozen=True, tag="press-power-button"):
    """Ask the guest to shut down. Answered by ``Status`` at once: what it does about it is its own business."""


class AskBalloon(msgspec.Struct, frozen=True, tag="balloon"):
    """What does the guest do without? Answered by ``Balloon``.

    Attributes:
        target_bytes: ask the guest to do without that much, first.
    """

    target_bytes: int | None = None


class AttachAgent(msgspec.Struct, frozen=True, tag="attach-agent"):
    """Talk to the agent in the guest, for as long as this connection lasts. Answered by ``Attached``.

    From then on the machine sends ``AgentSaid`` as it comes, and the client ``TellAgent``, each after the answer to the
    one before: so a client that hangs up is noticed while the guest does not read.
    """


class TellAgent(msgspec.Struct, frozen=True, tag="tell-agent"):
    """Send ``data`` (at most ``AGENT_PIECE`` bytes) to the agent. Answered by ``AgentTold`` once the guest takes it."""

    data: bytes


Request = (
    AskInfo
    | AskStart
    | AskPause
    | AskResume
    | AskStop
    | AskCounters
    | AskMap
    | AskMemory
    | AskConversions
    | Type
    | FollowOutput
    | FollowEvents
    | PressPowerButton
    | AskBalloon
    | AttachAgent
    | TellAgent
)


# -- answers -------------------------------------------------------------------------------------------------


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """It was not done.

    Attributes:
        kind: ``state`` (the machine's state does not allow it: ``action``, ``needed`` and ``found`` say more),
            ``private`` (``gpa`` is), ``range`` (not within memory or what may be asked), ``no-device`` (the machine has
            none), ``in-use`` (somebody else has it), ``busy`` (no room for one more who follows something),
            ``bad-request`` or ``bug``.
        message: one line.
    """

    kind: Literal["state", "private", "range", "no-device", "in-use", "busy", "bad-request", "bug"]
    message: str
    action: str = ""
    needed: str = ""
    found: str = ""
    gpa: int = 0


class Status(msgspec.Struct, frozen=True, tag="status"):
    """The state after a request: ``created``, ``running``, ``paused`` or ``stopped``, and when it was started."""

    state: str
    started_ns: int | None


class Info(msgspec.Struct, frozen=True, tag="info"):
    """All that does not change, and the state."""

    spec: MachineSpec
    state: str
    started_ns: int | None
    facts: dict[str, Any]


class CounterValues(msgspec.Struct, frozen=True, tag="counters"):
    """What the machine did so far.

    Attributes:
        requests: cause, direction, outcome and how many, for all that there were.
        shared_bytes, private_bytes: of all memory, now.
        waiting_us, applying_us, discarding_us: percentiles 50, 90 and 99 and the maximum, in microseconds.
        lost: records that the ring dropped before they were counted.
        hottest: gpa, bytes, count and overcount of the ranges that were converted most: see
            ``kvmd.conversion.hottest.HotRange``.
        balloon: what ``AskBalloon`` is answered by, or None where there is no balloon.
        held_back_us: how long vCPUs were kept out of the guest by ``conversion.rate``, all together, in microseconds.
    """

    requests: list[tuple[str, str, str, int]]
    shared_bytes: int
    private_bytes: int
    waiting_us: tuple[float, float, float, float]
    applying_us: tuple[float, float, float, float]
    discarding_us: tuple[float, float, float, float]
    lost: int
    hottest: list[tuple[int, int, int, int]] = []
    balloon: Balloon | None = None
    held_back_us: int = 0


class MemoryMap(msgspec.Struct, frozen=True, tag="map"):
    """All memory as ranges: start and end in bytes, and ``private`` or ``shared``.

    Attributes:
        ranges: in order.
        pinned: start and end of what never converts, or None.
    """

    ranges: list[tuple[int, int, str]]
    pinned: tuple[int, int] | None = None


class Memory(msgspec.Struct, frozen=True, tag="memory"):
    """Contents of shared memory."""

    data: bytes


class Conversions(msgspec.Struct, frozen=True, tag="conversions"):
    """Recent conversions, oldest first; a first sequence above the one asked for shows what is gone.

    Attributes:
        records: in order.
        last: the sequence of the last one that there is, whether it is among them or not; 0 for none yet.
    """

    records: list[ConversionRecord]
    last: int = 0


class Typed(msgspec.Struct, frozen=True, tag="typed"):
    """The console's input took everything."""


class OutputPiece(msgspec.Struct, frozen=True, tag="output"):
    """Some bytes of an output: see ``kvmd.machine_process.history.Piece``."""

    dropped: int
    start: int
    data: bytes


class Balloon(msgspec.Struct, frozen=True, tag="balloon"):
    """Memory that the guest does without.

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


class Attached(msgspec.Struct, frozen=True, tag="attached"):
    """The connection is the agent's now."""


class AgentSaid(msgspec.Struct, frozen=True, tag="agent-said"):
    """Some bytes of the agent's."""

    data: bytes


class AgentTold(msgspec.Struct, frozen=True, tag="agent-told"):
    """The agent's port took everything."""


class EventBatch(msgspec.Struct, frozen=True, tag="events"):
    """What happened.

    Attributes:
        lost_lifecycle, lost_conversions: how many were dropped unsent, before the first of each.
        lifecycle, conversions: in their order.
        last_lifecycle, last_conversion: the place after this batch.
    """

    lost_lifecycle: int
    lost_conversions: int
    lifecycle: list[LifecycleEvent]
    conversions: list[ConversionRecord]
    last_lifecycle: int
    last_conversion: int


Answer = (
    Refused
    | Status
    | Info
    | CounterValues
    | MemoryMap
    | Memory
    | Conversions
    | Typed
    | OutputPiece
    | EventBatch
    | Balloon
    | Attached
    | AgentSaid
    | AgentTold
    | Greeting
)


def encode_hook(value: object) -> object:
    """Make MessagePack of what msgspec does not know: paths, and nothing else.

    Raises:
        NotImplementedError: it is something else.
    """
    return str(value) if hasattr(value, "__fspath__") else _unknown(value)


def _unknown(value: object) -> object:
    raise NotImplementedError(f"{type(value)} has no place in a message")
