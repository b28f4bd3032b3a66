"""A fleet in memory: the whole protocol of ``kvmd.fleet.base``, without processes, files or KVM.

It passes the same contract tests as the real one (``tests/fleet/test_contract.py``). A test plays the guest through
``guest(name)``: prints, converts, logs and ends. A guest whose image is called ``echo`` plays itself: it does what
kvmd's own guest of that name does.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import msgspec
import trio

from kvmd.conversion.hottest import HottestRanges
from kvmd.errors import DeviceInUse, ImageError, MachineExists, MachineStateError, NoSuchDevice, UnknownMachine
from kvmd.fleet.base import (
    Balloon,
    Counters,
    Event,
    EventStream,
    MachineEnd,
    MachineInfo,
    MachineState,
    MemoryMap,
    OutputPart,
    counters_document,
)
from kvmd.fleet.streams import PlacedStream, Stream
from kvmd.memory.accessor import PrivateMemory
from kvmd.ranges import GpaRange, PageState
from kvmd.spec.machine import MachineSpec
from kvmd.units import PAGE_SIZE, page_ceil, page_floor

EVENTS_KEPT = 1024
CONVERSIONS_KEPT = 1024
OUTPUT_KEPT = 65536
_DIGITS = 18
INPUT_LIMIT = 4096
"""Bytes of input that a guest which does not read is given."""


class Output:
    """Bytes that are followed by any number of readers, each at its own pace."""

    def __init__(self) -> None:
        self.kept = bytearray()
        self.start = 0
        self.ended = False
        self._changed = trio.Event()

    def add(self, data: bytes) -> None:
        self.kept += data
        excess = max(0, len(self.kept) - OUTPUT_KEPT)
        del self.kept[:excess]
        self.start += excess
        self._wake()

    def end(self) -> None:
        self.ended = True
        self._wake()

    async def read(self, offset: int) -> tuple[int, bytes]:
        """Return the offset after, and what is there from ``offset`` on; nothing at the end."""
        while True:
            start = max(offset, self.start)
            data = bytes(self.kept[start - self.start :])
            if data or self.ended:
                await trio.lowlevel.checkpoint()
                return start + len(data), data
            await self._changed.wait()

    def follow(self, start: int, *, follow: bool) -> AsyncIterator[OutputPart]:
        offset = min(start, self.start + len(self.kept))

        async def following() -> OutputPart | None:
            nonlocal offset
            if not follow and offset >= self.start + len(self.kept):
                return None
            asked = offset
            offset, data = await self.read(offset)
            first = offset - len(data)
            return OutputPart(first, first - asked, data) if data else None

        return Stream(following)

    def _wake(self) -> None:
        event, self._changed = self._changed, trio.Event()
        event.set()


@dataclass
class FakeGuest:
    """One machine, and what a test makes it do."""

    fleet: FakeFleet
    info: MachineInfo
    console: Output = field(default_factory=Output)
    log: Output = field(default_factory=Output)
    input: bytearray = field(default_factory=bytearray)
    input_taken: trio.Event = field(default_factory=trio.Event)
    records: list[dict[str, object]] = field(default_factory=list)
    shared: list[GpaRange] = field(default_factory=list)
    converted: int = 0
    page: int = 1 << 20
    pinned: GpaRange | None = None
    stubborn: bool = False
    """A guest that does not stop when asked, nor shuts down."""
    balloon_target: int | None = None
    agent: FakeAgent | None = None

    @property
    def name(self) -> str:
        return self.info.name

    def print(self, data: bytes) -> None:
        self.console.add(data)

    def write_log(self, event: str) -> None:
        self.log.add(msgspec.json.encode({"event": event, "machine": self.name}) + b"\n")

    def echo(self, data: bytes) -> None:
        """Do what ``builtin:echo`` does, of which only ``c`` makes an end here."""
        for byte in data:
            self.print(bytes([byte]))
            match chr(byte):
                case "q" | "f":
                    self.end(status=0 if byte == ord("q") else 3)
                    return
                case "s":
                    self.page += PAGE_SIZE
                    self.convert(self.page)
                case "p":
                    self.convert(self.page, to=PageState.PRIVATE)
                case "c":
                    for _ in range(16):
                        self.convert(self.page)
                        self.convert(self.page, to=PageState.PRIVATE)
                case "x":
                    self.end("triple-fault", status=122)
                    return
                case _:
                    pass

    def take_input(self) -> bytes:
        """Read all input, as a guest that polls its serial port."""
        taken = bytes(self.input)
        self.input.clear()
        event, self.input_taken = self.input_taken, trio.Event()
        event.set()
        return taken

    def convert(self, gpa: int, *, to: PageState = PageState.SHARED, size_bytes: int = PAGE_SIZE) -> None:
        self.converted += 1
        range_ = GpaRange.of_size(gpa, size_bytes)
        self.shared = [other for other in self.shared if other != range_]
        if to is PageState.SHARED:
            self.shared.append(range_)
            self.shared.sort()
        record: dict[str, object] = {
            "sequence": self.converted,
            "time": "2026-01-01T00:00:00.000000Z",
            "monotonic_ns": self.converted,
            "machine": self.name,
            "vcpu": 0,
            "cause": "implicit",
            "gpa": hex(gpa),
            "size": size_bytes,
            "from": to.opposite.value,
            "to": to.value,
            "outcome": "converted",
            "merged": 1,
            "waiting_us": 1.0,
            "applying_us": 2.0,
            "discarding_us": 3.0,
        }
        self.records = [*self.records, record][-CONVERSIONS_KEPT:]
        self.fleet.tell("conversion", self.name, record)

    def end(
        self, reason: str = "guest-exit", *, status: int = 0, message: str = "ended", signal: int | None = None
    ) -> None:
        end = MachineEnd(reason=reason, message=message, status=status, signal=signal, wall_ns=time.time_ns())
        self.change("stopped", "stopped", pid=None, end=end)
        self.console.end()
        self.log.end()
        self.take_input()
        if self.agent is not None:
            self.agent.end()

    def change(self, change: str, state: MachineState, **fields: object) -> None:
        self.info = msgspec.structs.replace(self.info, state=state, **fields)
        end = self.info.end
        ending = {} if end is None else msgspec.to_builtins(end)
        self.fleet.tell("lifecycle", self.name, {"change": change, "state": state, **ending})
        self.fleet.wake()

    def need(self, action: str, *states: MachineState) -> None:
        if self.info.state not in states:
            raise MachineStateError(action, needed=" or ".join(states), found=self.info.state)


class FakeFleet:
    """All machines of a daemon, in memory."""

    def __init__(self) -> None:
        self._guests: dict[str, FakeGuest] = {}
        self._changed = trio.Event()
        self._events: list[tuple[int, Event]] = []
        self._told = 0
        self._next_pid = 1000

    # -- for tests

    def guest(self, name: str) -> FakeGuest:
        try:
            return self._guests[name]
        except KeyError:
            raise UnknownMachine(f"there is no machine {name}") from None

    def tell(self, kind: str, machine: str, data: dict[str, object]) -> None:
        self._told += 1
        self._events.append((self._told, Event(id=str(self._told), kind=kind, machine=machine, data=data)))
        del self._events[:-EVENTS_KEPT]
        self.wake()

    def wake(self) -> None:
        event, self._changed = self._changed, trio.Event()
        event.set()

    # -- the protocol

    def machines(self) -> Sequence[MachineInfo]:
        return [self._guests[name].info for name in sorted(self._guests)]

    def machine(self, name: str) -> MachineInfo:
        return self.guest(name).info

    async def create(
        self, spec: MachineSpec, *, owner_uid: int, files: Sequence[int] = (), any_name: bool = False
    ) -> MachineInfo:
        await trio.lowlevel.checkpoint()
        name = self._free_name(spec.name, any_name=any_name)
        if not files and not spec.guest.is_file():
            raise ImageError(f"cannot read the image {spec.guest}: No such file or directory")
        self._next_pid += 1
        info = MachineInfo(
            name=name,
            spec=spec.with_overrides(name=name),
            state="created",
            owner_uid=owner_uid,
            created_ns=time.time_ns(),
            started_ns=None,
            pid=self._next_pid,
            facts={"vcpus": spec.vcpus, "protection": "fake"},
            end=None,
        )
        guest = self._guests[name] = FakeGuest(self, info)
        guest.change("created", "created")
        return guest.info

    def _free_name(self, name: str, *, any_name: bool) -> str:
        if name not in self._guests:
            return name
        if not any_name:
            raise MachineExists(f"there is a machine {name} already")
        number = 2
        while f"{name}-{number}" in self._guests:
            number += 1
        return f"{name}-{number}"

    async def delete(self, name: str) -> None:
        await trio.lowlevel.checkpoint()
        guest = self.guest(name)
        guest.need("delete", "created", "stopped")
        if guest.info.state == "created":
            guest.end("killed", status=127, message="deleted before it was started")
        del self._guests[name]
        self.tell("lifecycle", name, {"change": "deleted"})
        self.wake()

    async def start(self, name: str) -> MachineInfo:
        await trio.lowlevel.checkpoint()
        guest = self.guest(name)
        guest.need("start", "created")
        guest.change("started", "running", started_ns=time.time_ns())
        if guest.info.spec.guest.stem == "echo":
            guest.write_log("machine-starting")
            guest.print(b"echo: type\n")
            guest.echo(guest.take_input())
        return guest.info

    async def pause(self, name: str) -> MachineInfo:
        await trio.lowlevel.checkpoint()
        guest = self.guest(name)
        guest.need("pause", "running")
        guest.change("paused", "paused")
        return guest.info

    async def resume(self, name: str) -> MachineInfo:
        await trio.lowlevel.checkpoint()
        guest = self.guest(name)
        guest.need("resume", "paused")
        guest.change("resumed", "running")
        if guest.info.spec.guest.stem == "echo":
            guest.echo(guest.take_input())
        return guest.info

    async def stop(self, name: str) -> MachineInfo:
        await trio.lowlevel.checkpoint()
        guest = self.guest(name)
        guest.need("stop", "running", "paused")
        if not guest.stubborn:
            guest.end("operator", status=126, message="stopped by the operator")
        return await self.wait(name, frozenset({"stopped"}))

    async def kill(self, name: str) -> MachineInfo:
        await trio.lowlevel.checkpoint()
        guest = self.guest(name)
        guest.need("kill", "created", "running", "paused")
        guest.end("killed", status=127, message="killed by the operator", signal=9)
        return guest.info

    async def wait(self, name: str, states: frozenset[MachineState]) -> MachineInfo:
        guest = self.guest(name)
        await trio.lowlevel.checkpoint()
        while guest.info.state not in states:
            if self._guests.get(name) is not guest:
                raise UnknownMachine(f"machine {name} was deleted")
            await self._changed.wait()
        return guest.info

    async def counters(self, name: str) -> Counters:
        await trio.lowlevel.checkpoint()
        return self._counters(self.guest(name))

    def count(self, name: str) -> None:
        """Tell a machine's counters to those who follow, as is done once a second."""
        self.tell("counters", name, counters_document(self._counters(self.guest(name))))

    def _counters(self, guest: FakeGuest) -> Counters:
        shared = sum(range_.size_bytes for range_ in guest.shared)
        requests: dict[tuple[str, str, str], int] = {}
        hottest = HottestRanges()
        for record in guest.records:
            hottest.add(int(str(record["gpa"]), 16), int(str(record["size"])))
            key = str(record["cause"]), str(record["to"]), str(record["outcome"])
            requests[key] = requests.get(key, 0) + 1
        return Counters(
            requests=requests,
            shared_bytes=shared,
            private_bytes=guest.info.spec.memory - shared,
            waiting_us=(1.0, 1.0, 1.0, 1.0),
            applying_us=(2.0, 2.0, 2.0, 2.0),
            discarding_us=(3.0, 3.0, 3.0, 3.0),
            lost=0,
            held_back_us=250_000,
            hottest=hottest.top(10),
            balloon=self._balloon(guest) if guest.info.spec.balloon else None,
        )

    async def memory_map(self, name: str) -> MemoryMap:
        await trio.lowlevel.checkpoint()
        guest = self.guest(name)
        guest.need("show the memory of it", "created", "running", "paused")
        found: list[tuple[GpaRange, PageState]] = []
        at = 0
        for range_ in guest.shared:
            if found and found[-1] == (GpaRange(found[-1][0].start, at), PageState.SHARED) and range_.start == at:
                found[-1] = (GpaRange(found[-1][0].start, range_.end), PageState.SHARED)
            else:
                if range_.start > at:
                    found.append((GpaRange(at, range_.start), PageState.PRIVATE))
                found.append((range_, PageState.SHARED))
            at = range_.end
        if at < guest.info.spec.memory:
            found.append((GpaRange(at, guest.info.spec.memory), PageState.PRIVATE))
        return MemoryMap(found, guest.pinned)

    async def read_memory(self, name: str, gpa: int, size_bytes: int) -> bytes:
        await trio.lowlevel.checkpoint()
        guest = self.guest(name)
        guest.need("read the memory of it", "created", "running", "paused")
        if gpa < 0 or size_bytes < 1 or gpa + size_bytes > guest.info.spec.memory:
            raise ValueError(f"{size_bytes} bytes at {gpa:#x} are not within memory")
        pages = GpaRange(page_floor(gpa), page_ceil(gpa + size_bytes))
        for page in range(pages.start, pages.end, PAGE_SIZE):
            if not any(range_.start <= page < range_.end for range_ in guest.shared):
                raise PrivateMemory(page)
        return bytes(size_bytes)

    async def conversions(self, name: str, *, since: int, limit: int) -> Sequence[dict[str, object]]:
        await trio.lowlevel.checkpoint()
        found = [record for record in self.guest(name).records if int(str(record["sequence"])) > since]
        return found[:limit]

    async def last_conversion(self, name: str) -> int:
        await trio.lowlevel.checkpoint()
        return self.guest(name).converted

    @asynccontextmanager
    async def events(self, name: str | None, *, last_id: str | None) -> AsyncIterator[EventStream]:
        await trio.lowlevel.checkpoint()
        if name is not None:
            self.guest(name)
        position = self._told if last_id is None else _number(last_id)
        if position > self._told:
            raise ValueError(f"{last_id!r} was never an id of this stream")
        yield self._follow(name, position)

    def _follow(self, name: str | None, position: int) -> EventStream:
        guest = None if name is None else self._guests.get(name)

        async def following() -> Event | None:
            nonlocal position
            await trio.lowlevel.checkpoint()
            while True:
                first = self._told - len(self._events)
                if position < first:
                    lost, position = first - position, first
                    return Event(id=str(first), kind="lost", machine=name or "", data={"lost": lost})
                for number, event in self._events:
                    if number > position and name in {None, event.machine}:
                        position = number
                        return event
                position = self._told
                if guest is not None and guest.info.state == "stopped":
                    return None
                await self._changed.wait()

        return PlacedStream(following, lambda: str(position))

    @asynccontextmanager
    async def console(self, name: str) -> AsyncIterator[FakeConsole]:
        await trio.lowlevel.checkpoint()
        yield FakeConsole(self.guest(name))

    @asynccontextmanager
    async def agent(self, name: str) -> AsyncIterator[FakeAgent]:
        await trio.lowlevel.checkpoint()
        guest = self.guest(name)
        guest.need("talk to the agent", "created", "running", "paused")
        if not guest.info.spec.agent:
            raise NoSuchDevice("the machine has no port for an agent: Linux guests have one with agent = NAME")
        if guest.agent is not None:
            raise DeviceInUse("somebody else talks to the agent: it has one connection at a time")
        guest.agent = FakeAgent(guest)
        try:
            yield guest.agent
        finally:
            guest.agent = None

    async def press_power_button(self, name: str) -> MachineInfo:
        await trio.lowlevel.checkpoint()
        guest = self.guest(name)
        if guest.info.spec.kernel is None:
            raise NoSuchDevice("the machine has no power button: Linux guests have one")
        guest.need("press the power button", "running")
        if not guest.stubborn and not guest.name.startswith("stubborn"):
            guest.end("guest-power-off", status=0)
        return guest.info

    async def balloon(self, name: str) -> Balloon:
        await trio.lowlevel.checkpoint()
        guest = self.guest(name)
        guest.need("reach the balloon", "created", "running", "paused")
        spec = guest.info.spec
        if not spec.balloon:
            raise NoSuchDevice("the machine has no balloon: Linux guests have one with balloon = true")
        return self._balloon(guest)

    def _balloon(self, guest: FakeGuest) -> Balloon:
        spec = guest.info.spec
        target = spec.balloon_target if guest.balloon_target is None else guest.balloon_target
        changed = guest.balloon_target is not None
        held = 0 if guest.info.state == "stopped" else spec.memory // 4
        return Balloon(target, target // 2, target // 2 if changed else 0, held)

    async def set_balloon(self, name: str, target_bytes: int) -> Balloon:
        await self.balloon(name)
        guest = self.guest(name)
        if target_bytes % PAGE_SIZE or not 0 <= target_bytes < guest.info.spec.memory:
            raise ValueError(
                f"target: {target_bytes} is not a number of whole pages below the {guest.info.spec.memory} of memory"
            )
        guest.balloon_target = target_bytes
        return await self.balloon(name)

    @asynccontextmanager
    async def console_output(
        self, name: str, *, start: int = 0, follow: bool = True
    ) -> AsyncIterator[AsyncIterator[OutputPart]]:
        await trio.lowlevel.checkpoint()
        yield self.guest(name).console.follow(start, follow=follow)

    @asynccontextmanager
    async def log_output(
        self, name: str, *, start: int = 0, follow: bool = True
    ) -> AsyncIterator[AsyncIterator[OutputPart]]:
        await trio.lowlevel.checkpoint()
        yield self.guest(name).log.follow(start, follow=follow)


class FakeAgent:
    """A connection to an agent that answers in capitals; "deaf" makes it never listen again."""

    def __init__(self, guest: FakeGuest) -> None:
        self._guest = guest
        self.deaf = False
        self._send, self._receive = trio.open_memory_channel[bytes](0)

    async def receive(self) -> bytes:
        try:
            return await self._receive.receive()
        except trio.EndOfChannel:
            return b""

    async def send(self, data: bytes) -> None:
        if data == b"deaf":
            self.deaf = True
            await trio.sleep_forever()
        self._guest.need("talk to the agent", "created", "running", "paused")
        await self._send.send(data.upper())

    def end(self) -> None:
        self._send.close()


class FakeConsole:
    """A connection to one machine's console."""

    def __init__(self, guest: FakeGuest) -> None:
        self._guest = guest
        self._offset = guest.console.start

    async def receive(self) -> bytes:
        self._offset, data = await self._guest.console.read(self._offset)
        return data

    async def send(self, data: bytes) -> None:
        for at in range(0, len(data), INPUT_LIMIT):
            part = data[at : at + INPUT_LIMIT]
            while self._guest.info.state != "stopped" and len(self._guest.input) + len(part) > INPUT_LIMIT:
                await self._guest.input_taken.wait()
            self._guest.need("type into the console of it", "created", "running", "paused")
            self._guest.input += part
            if self._guest.info.spec.guest.stem == "echo" and self._guest.info.state == "running":
                self._guest.echo(self._guest.take_input())
        await trio.lowlevel.checkpoint()


def _number(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > _DIGITS:
        raise ValueError(f"{text!r} was never an id of this stream")
    return int(text)
