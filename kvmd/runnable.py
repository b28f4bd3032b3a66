"""What those who run a machine ask of it: ``kvmd.machine.Machine``, and a fake of it in tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from kvmd.conversion.ring import RecordRing
from kvmd.conversion.stats import ConversionStats
from kvmd.devices.console import ConsoleOutput
from kvmd.devices.mmio import MmioCounter
from kvmd.devices.ports import PortBus
from kvmd.ranges import GpaRange, PageState
from kvmd.spec.machine import MachineSpec
from kvmd.stop import STOPPED, Stop

SHUTDOWN_SECONDS = 10.0
"""How long a guest may take that was asked by its power button to shut down, before it is stopped. systemd gives a
machine's process 20 s (TimeoutStopSec=)."""


class Stoppable(Protocol):
    """Something that the operator can stop."""

    @property
    def power_button(self) -> Callable[[], None] | None:
        """What presses its power button, if it has one."""

    def stop(self, message: str = STOPPED) -> None:
        """Stop as the operator wishes, for the reason that ``message`` gives; harmless when it has ended."""


class Runnable(Stoppable, Protocol):
    """A machine that is open and can be run once."""

    @property
    def spec(self) -> MachineSpec:
        """What it is made of."""

    @property
    def stats(self) -> ConversionStats:
        """Counters of its conversions."""

    @property
    def records(self) -> RecordRing:
        """Its last conversions."""

    @property
    def console(self) -> ConsoleOutput:
        """What the guest prints."""

    @property
    def ports(self) -> PortBus:
        """Its I/O ports."""

    @property
    def mmio(self) -> MmioCounter:
        """Accesses outside memory."""

    @property
    def pinned(self) -> GpaRange:
        """Memory that never converts."""

    async def run(self) -> Stop:
        """Run the guest to its end."""

    @property
    def held_back_us(self) -> int:
        """How long vCPUs were kept out of the guest by ``conversion.rate``, all together, in microseconds."""

    def memory_map(self) -> list[tuple[GpaRange, PageState]]:
        """Return the state of all memory, as the fewest ranges, in order."""
