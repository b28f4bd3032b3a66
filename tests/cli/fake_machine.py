"""A machine without a hypervisor: it runs a script."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import ClassVar, Self

import msgspec
import trio

from kvmd.closing import Closing
from kvmd.conversion.messages import Outcome
from kvmd.conversion.ring import RecordRing
from kvmd.conversion.stats import ConversionStats
from kvmd.devices.console import ConsoleOutput
from kvmd.devices.mmio import MmioCounter
from kvmd.devices.ports import PortBus
from kvmd.ranges import GpaRange, PageState
from kvmd.spec.machine import MachineSpec
from kvmd.stop import STOPPED, Stop, StopReason
from kvmd.units import PAGE_SIZE
from tests.conversion.records import RECORD

PINNED_BYTES = 4 * PAGE_SIZE


Script = Callable[["FakeMachine"], Awaitable[Stop | None]]
"""What the guest does; None: it ends with status 0."""


class FakeMachine(Closing):
    """A machine whose guest does what ``script`` says; make a class for each test with ``machine_class``."""

    script: ClassVar[Script]
    opened: ClassVar[list[FakeMachine]] = []

    def __init__(self, spec: MachineSpec) -> None:
        self.spec = spec
        self.stats = ConversionStats()
        self.records = RecordRing()
        self.console = ConsoleOutput()
        self.ports = PortBus()
        self.mmio = MmioCounter()
        self.pinned = GpaRange(0, PINNED_BYTES)
        self.shared: GpaRange | None = None
        self.held_back_us = 0
        self.stopped = trio.Event()
        self.stop_message = ""
        self.pressed = trio.Event()
        self.power_button = None if spec.kernel is None else self.pressed.set
        self.closed = False

    @classmethod
    def open(cls, spec: MachineSpec) -> Self:
        machine = cls(spec)
        cls.opened.append(machine)
        return machine

    def convert(self, gpa: int, *, to: PageState = PageState.SHARED, outcome: Outcome = Outcome.CONVERTED) -> None:
        record = msgspec.structs.replace(
            RECORD,
            sequence=self.records.appended + 1,
            monotonic_ns=1_000_000_000 * (self.records.appended + 1),
            gpa=gpa,
            came_from=to.opposite,
            to=to,
            outcome=outcome,
            applying_ns=200000,
            discarding_ns=30000,
        )
        self.stats.add(record)
        self.records.append(record)
        self.shared = GpaRange.of_size(gpa, PAGE_SIZE) if to is PageState.SHARED else None

    def print(self, text: bytes) -> None:
        for byte in text:
            self.console.put(byte)

    async def run(self) -> Stop:
        await trio.lowlevel.checkpoint()
        stop = await type(self).script(self)
        return stop or Stop(StopReason.GUEST_EXIT, "all vCPUs ended", 0)

    async def wait_for_stop(self) -> Stop:
        await self.stopped.wait()
        return Stop.because(StopReason.OPERATOR, self.stop_message)

    def stop(self, message: str = STOPPED) -> None:
        self.stop_message = message
        self.stopped.set()

    def memory_map(self) -> list[tuple[GpaRange, PageState]]:
        if self.shared is None:
            return [(GpaRange(0, self.spec.memory), PageState.PRIVATE)]
        return [
            (GpaRange(0, self.shared.start), PageState.PRIVATE),
            (self.shared, PageState.SHARED),
            (GpaRange(self.shared.end, self.spec.memory), PageState.PRIVATE),
        ]

    def close(self) -> None:
        self.closed = True


async def does_nothing(_machine: FakeMachine) -> None:
    """End at once."""
    await trio.lowlevel.checkpoint()


def machine_class(script: Script = does_nothing) -> type[FakeMachine]:
    """Return a class of machines of its own, which remembers those it opened."""
    return type("Fake", (FakeMachine,), {"script": staticmethod(script), "opened": []})
