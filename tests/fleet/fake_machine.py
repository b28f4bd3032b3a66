"""A machine without a hypervisor, for real machine processes: its guest does what ``builtin:echo`` does."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, Sequence

import trio

from kvmd.conversion.messages import Cause, Outcome
from kvmd.conversion.record import ConversionRecord
from kvmd.conversion.ring import RecordRing
from kvmd.conversion.stats import ConversionStats
from kvmd.devices.console import ConsoleOutput
from kvmd.devices.console_input import ConsoleInput
from kvmd.devices.mmio import MmioCounter
from kvmd.devices.ports import PortBus
from kvmd.errors import ImageError, MachineStateError
from kvmd.memory.accessor import PrivateMemory
from kvmd.memory.page_state import PageStateMap
from kvmd.ranges import GpaRange, PageState
from kvmd.spec.machine import MachineSpec
from kvmd.stop import STOPPED, Stop, StopReason
from kvmd.units import PAGE_SIZE, page_ceil, page_floor
from kvmd.virtio.host_port import HostPort

FIRST_FREE = 1 << 20
_TICK_SECONDS = 0.001


class FakeBalloon:
    """A guest that does without half of what it is asked for."""

    def __init__(self, target_bytes: int) -> None:
        self.target_bytes = target_bytes
        self.discarded_bytes = 0

    @property
    def actual_bytes(self) -> int:
        return self.target_bytes // 2

    def set_target(self, size_bytes: int) -> None:
        self.target_bytes = size_bytes
        self.discarded_bytes += size_bytes // 2


class FakeMachine:
    """One guest, which is a task of the event loop and polls its console a thousand times a second."""

    def __init__(self, spec: MachineSpec) -> None:
        self.spec = spec
        self.records = RecordRing()
        self.stats = ConversionStats(self.records.reader())
        self.console = ConsoleOutput()
        self.typed = ConsoleInput()
        self.ports = PortBus()
        self.mmio = MmioCounter()
        self.pinned = GpaRange(0, FIRST_FREE)
        self.memory = self
        self.agent = HostPort() if spec.agent else None
        self.balloon = FakeBalloon(spec.balloon_target) if spec.balloon else None
        self.power_button = self._shut_down if spec.kernel is not None else None
        self.held_back_us = 0
        self.state = "created"
        self._map = PageStateMap(spec.memory, PageState.PRIVATE)
        self._page = FIRST_FREE
        self._next = FIRST_FREE
        self._stop: Stop | None = None
        self._changed = trio.Event()
        self._storm = False

    @property
    def facts(self) -> Mapping[str, object]:
        return {"vcpus": self.spec.vcpus, "protection": "fake"}

    async def run(self) -> Stop:
        self.state = "running"
        async with trio.open_nursery() as nursery:
            if self.agent is not None:
                nursery.start_soon(_be_agent, self.agent)
            stop = await self._run()
            nursery.cancel_scope.cancel()
        self.state = "stopped"
        return stop

    async def _run(self) -> Stop:
        for byte in b"echo: type\n":
            self.console.put(byte)
        while self._stop is None:
            if self.state == "paused":
                await self._changed.wait()
                continue
            if (byte_typed := self.typed.take()) is not None:
                self._storm = False
                self.console.put(byte_typed)
                self._obey(chr(byte_typed))
            elif self._storm:
                for _ in range(8):
                    self._convert(PageState.SHARED)
                    self._convert(PageState.PRIVATE)
            with trio.move_on_after(_TICK_SECONDS):
                await self._changed.wait()
        return self._stop

    def _shut_down(self) -> None:
        """Do what a guest does whose power button is pressed; one that is called stubborn says no."""
        if self.spec.name.startswith("stubborn"):
            for byte in b"no\n":
                self.console.put(byte)
        elif self._stop is None:
            self._stop = Stop.because(StopReason.GUEST_POWER_OFF, "the guest powered off")
        self._wake()

    def held_bytes(self) -> int:
        return self.spec.memory // 4

    def _obey(self, command: str) -> None:
        match command:
            case "q" | "f":
                self._stop = Stop(StopReason.GUEST_EXIT, "all vCPUs ended", 0 if command == "q" else 3)
            case "s":
                self._page = self._next
                self._next += PAGE_SIZE
                self._convert(PageState.SHARED)
            case "p":
                self._convert(PageState.PRIVATE)
            case "c":
                self._storm = True
            case "x":
                self._stop = Stop.because(StopReason.TRIPLE_FAULT, "vCPU 0: triple fault", vcpu=0)
            case "!":
                os.kill(os.getpid(), signal.SIGSEGV)
            case _:
                pass

    def _convert(self, to: PageState) -> None:
        range_ = GpaRange.of_size(self._page, PAGE_SIZE)
        sequence = self.records.appended + 1
        self._map.set(range_, to, sequence, explicit=False)
        self.records.append(
            ConversionRecord(
                sequence=sequence,
                wall_ns=time.time_ns(),
                monotonic_ns=time.monotonic_ns(),
                vcpu=0,
                cause=Cause.IMPLICIT,
                gpa=self._page,
                size_bytes=PAGE_SIZE,
                came_from=to.opposite,
                to=to,
                outcome=Outcome.CONVERTED,
                merged=1,
                waiting_ns=1000,
                applying_ns=2000,
                discarding_ns=3000,
            )
        )

    def stop(self, message: str = STOPPED) -> None:
        if self._stop is None:
            self._stop = Stop.because(StopReason.OPERATOR, message)
        self._wake()

    async def pause(self) -> None:
        self._need("pause", "running")
        self.state = "paused"
        await trio.lowlevel.checkpoint()

    async def resume(self) -> None:
        self._need("resume", "paused")
        self.state = "running"
        self._wake()
        await trio.lowlevel.checkpoint()

    def memory_map(self) -> list[tuple[GpaRange, PageState]]:
        return self._map.coalesced()

    def read(self, gpa: int, size_bytes: int) -> bytes:
        if size_bytes <= 0 or gpa < 0 or gpa + size_bytes > self.spec.memory:
            raise IndexError("not within memory")
        private = self._map.first_in_state(PageState.PRIVATE, GpaRange(page_floor(gpa), page_ceil(gpa + size_bytes)))
        if private is not None:
            raise PrivateMemory(private)
        return bytes(size_bytes)

    def close(self) -> None:
        self.state = "closed"

    def _wake(self) -> None:
        event, self._changed = self._changed, trio.Event()
        event.set()

    def _need(self, action: str, needed: str) -> None:
        if self.state != needed:
            raise MachineStateError(action, needed=needed, found=self.state)


async def _be_agent(port: HostPort) -> None:
    """Answer what the host says in capitals; "deaf" makes it never listen again."""
    while True:
        visit, data = await port.take()
        if data == b"deaf":
            await trio.sleep_forever()
        await port.deliver(visit, data.upper())


def open_fake(spec: MachineSpec, *, files: Sequence[int] = ()) -> FakeMachine:
    """Make one; an image that cannot be read is refused like a real machine's."""
    if not files and not spec.guest.is_file():
        raise ImageError(f"cannot read the image {spec.guest}: No such file or directory")
    return FakeMachine(spec)
