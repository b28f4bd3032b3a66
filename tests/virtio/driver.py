"""A small virtio driver over the register interface and real guest memory: what a guest's kernel would do.

It lays things out itself, so that a test can also write into rings and tables what no good driver would.
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress

import trio

from kvmd.memory.accessor import HostAccessor
from kvmd.memory.backing import Backing
from kvmd.memory.page_state import PageStateMap
from kvmd.ranges import GpaRange, PageState
from kvmd.units import MIB, PAGE_SIZE
from kvmd.virtio import mmio
from kvmd.virtio.abi import (
    DESC_INDIRECT,
    DESC_NEXT,
    DESC_WRITE,
    F_EVENT_IDX,
    F_INDIRECT_DESC,
    F_VERSION_1,
    INTERRUPT_CONFIG,
    Status,
)
from kvmd.virtio.device import VirtioDevice
from kvmd.virtio.device_model import DeviceModel
from kvmd.virtio.serving import serve

SIZE = 16 * MIB
WATCHDOG_SECONDS = 20.0
"""Only a test that fails waits this long."""


class Memory:
    """Guest memory of 16 MiB, all shared; pages turn private only where a test says so."""

    def __init__(self, shared: Backing, *, converts: bool) -> None:
        self.shared = shared
        self.lock = threading.Lock()
        self.state = PageStateMap(SIZE, PageState.SHARED)
        self.accessor = HostAccessor(self.state, shared, self.lock, converts=converts)
        self._free = PAGE_SIZE
        self._sequence = 0

    def allocate(self, size_bytes: int, align: int = 16) -> int:
        """Return the gpa of fresh memory."""
        gpa = -(-self._free // align) * align
        self._free = gpa + size_bytes
        assert self._free <= SIZE, "the test's memory is too small"
        return gpa

    def read(self, gpa: int, size_bytes: int) -> bytes:
        """Read as the guest."""
        return bytes(self.shared.view[gpa : gpa + size_bytes])

    def write(self, gpa: int, data: bytes) -> None:
        """Write as the guest."""
        self.shared.view[gpa : gpa + len(data)] = data

    def turn_private(self, gpa: int, size_bytes: int = PAGE_SIZE) -> None:
        """Convert pages, as the conversion service would."""
        range_ = GpaRange.of_size(gpa, size_bytes)
        with self.lock:
            self._sequence += 1
            self.state.set(range_, PageState.PRIVATE, self._sequence, explicit=True)
            self.shared.discard(range_)


@contextmanager
def guest_memory(*, converts: bool = False) -> Iterator[Memory]:
    """Yield guest memory."""
    with Backing("shared", SIZE) as shared:
        yield Memory(shared, converts=converts)


class DriverQueue:
    """The driver's side of a split queue."""

    def __init__(self, driver: Driver, index: int, size: int) -> None:
        memory = driver.memory
        self.driver = driver
        self.memory = memory
        self.index = index
        self.size = size
        self.table = memory.allocate(16 * size, PAGE_SIZE)
        self.avail = memory.allocate(6 + 2 * size, 2)
        self.used = memory.allocate(6 + 8 * size, 4)
        memory.write(self.table, bytes(16 * size))
        memory.write(self.avail, bytes(6 + 2 * size))
        memory.write(self.used, bytes(6 + 8 * size))
        self.free = list(range(size))
        self.avail_index = 0
        self.used_index = 0
        self._chains: dict[int, list[int]] = {}

    def describe(self, index: int, gpa: int, size_bytes: int, flags: int = 0, following: int = 0) -> None:
        """Write one descriptor of the table."""
        self.memory.write(self.table + 16 * index, struct.pack("<QIHH", gpa, size_bytes, flags, following))

    def offer_head(self, head: int) -> None:
        """Put a head into the available ring, whatever it is."""
        self.memory.write(self.avail + 4 + 2 * (self.avail_index % self.size), struct.pack("<H", head))
        self.set_avail_index(self.avail_index + 1)

    def set_avail_index(self, index: int) -> None:
        """Move the available index."""
        self.avail_index = index & 0xFFFF
        self.memory.write(self.avail + 2, struct.pack("<H", self.avail_index))

    def offer(
        self,
        readable: Sequence[tuple[int, int]] = (),
        writable: Sequence[tuple[int, int]] = (),
        *,
        indirect: bool = False,
    ) -> int:
        """Make a buffer available, given as (gpa, bytes), and return its head."""
        parts = [(gpa, size, 0) for gpa, size in readable] + [(gpa, size, DESC_WRITE) for gpa, size in writable]
        if indirect:
            table = self.memory.allocate(16 * len(parts))
            for at, (gpa, size, flags) in enumerate(parts):
                more = DESC_NEXT if at + 1 < len(parts) else 0
                self.memory.write(table + 16 * at, struct.pack("<QIHH", gpa, size, flags | more, at + 1))
            parts = [(table, 16 * len(parts), DESC_INDIRECT)]
        taken = [self.free.pop(0) for _ in parts]
        for at, (gpa, size, flags) in enumerate(parts):
            following = taken[at + 1] if at + 1 < len(taken) else 0
            self.describe(taken[at], gpa, size, flags | (DESC_NEXT if at + 1 < len(taken) else 0), following)
        self._chains[taken[0]] = taken
        self.offer_head(taken[0])
        return taken[0]

    def kick(self) -> None:
        """Notify the device."""
        self.driver.write(mmio.QUEUE_NOTIFY, self.index)

    @property
    def device_used_index(self) -> int:
        """What the device has published."""
        (index,) = struct.unpack("<H", self.memory.read(self.used + 2, 2))
        return int(index)

    @property
    def used_flags(self) -> int:
        (flags,) = struct.unpack("<H", self.memory.read(self.used, 2))
        return int(flags)

    @property
    def avail_event(self) -> int:
        (event,) = struct.unpack("<H", self.memory.read(self.used + 4 + 8 * self.size, 2))
        return int(event)

    def set_used_event(self, index: int) -> None:
        """Ask for an interrupt when the used index passes this one (F_EVENT_IDX)."""
        self.memory.write(self.avail + 4 + 2 * self.size, struct.pack("<H", index & 0xFFFF))

    def take_used(self) -> list[tuple[int, int]]:
        """Return (head, bytes written) of everything that came back since."""
        found = []
        while self.used_index != self.device_used_index:
            entry = self.memory.read(self.used + 4 + 8 * (self.used_index % self.size), 8)
            head, written = struct.unpack("<II", entry)
            self.used_index = (self.used_index + 1) & 0xFFFF
            self.free.extend(self._chains.pop(head, ()))
            found.append((head, written))
        self.set_used_event(self.used_index)
        return found

    async def completed(self, count: int = 1) -> list[tuple[int, int]]:
        """Wait for ``count`` buffers to come back."""
        found: list[tuple[int, int]] = []
        with trio.fail_after(WATCHDOG_SECONDS):
            while len(found) < count:
                found += self.take_used()
                if len(found) < count:
                    await self.driver.interrupted()
        return found


class Driver:
    """Drives one device through its registers."""

    def __init__(self, memory: Memory, transport: mmio.MmioTransport, irq: int) -> None:
        self.memory = memory
        self.transport = transport
        self.device = transport.device
        self.queues: dict[int, DriverQueue] = {}
        self.features = 0
        self._irq = irq

    # -- registers -----------------------------------------------------------------------------------------------------

    def read(self, offset: int) -> int:
        return int.from_bytes(self.transport.read(offset, 4), "little")

    def write(self, offset: int, value: int) -> None:
        self.transport.write(offset, value.to_bytes(4, "little"))

    def config(self, offset: int, size_bytes: int) -> bytes:
        return self.transport.read(mmio.CONFIG + offset, size_bytes)

    @property
    def status(self) -> Status:
        return Status(self.read(mmio.STATUS))

    @property
    def needs_reset(self) -> bool:
        return bool(self.status & Status.NEEDS_RESET)

    # -- set-up, clause 3.1.1 ------------------------------------------------------------------------------------------

    def offered(self) -> int:
        self.write(mmio.DEVICE_FEATURES_SEL, 0)
        low = self.read(mmio.DEVICE_FEATURES)
        self.write(mmio.DEVICE_FEATURES_SEL, 1)
        return low | self.read(mmio.DEVICE_FEATURES) << 32

    def negotiate(self, features: int) -> bool:
        """Reset, accept the features, and tell whether the device agreed."""
        self.write(mmio.STATUS, 0)
        self.write(mmio.STATUS, Status.ACKNOWLEDGE)
        self.write(mmio.STATUS, Status.ACKNOWLEDGE | Status.DRIVER)
        for half in (0, 1):
            self.write(mmio.DRIVER_FEATURES_SEL, half)
            self.write(mmio.DRIVER_FEATURES, features >> 32 * half & 0xFFFFFFFF)
        self.write(mmio.STATUS, Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK)
        self.features = features
        return bool(self.status & Status.FEATURES_OK)

    def set_up_queue(self, index: int, size: int | None = None) -> DriverQueue:
        self.write(mmio.QUEUE_SEL, index)
        size = size or self.read(mmio.QUEUE_NUM_MAX)
        queue = DriverQueue(self, index, size)
        self.place_queue(index, size, (queue.table, queue.avail, queue.used))
        self.queues[index] = queue
        return queue

    def place_queue(self, index: int, size: int, addresses: tuple[int, int, int]) -> None:
        self.write(mmio.QUEUE_SEL, index)
        self.write(mmio.QUEUE_NUM, size)
        registers = (mmio.QUEUE_DESC_LOW, mmio.QUEUE_DRIVER_LOW, mmio.QUEUE_DEVICE_LOW)
        for low, gpa in zip(registers, addresses, strict=True):
            self.write(low, gpa & 0xFFFFFFFF)
            self.write(low + 4, gpa >> 32)
        self.write(mmio.QUEUE_READY, 1)

    def go(self) -> None:
        """Set DRIVER_OK."""
        self.write(mmio.STATUS, self.status | Status.DRIVER_OK)

    def start(
        self,
        features: int | None = None,
        *,
        queues: Sequence[int] | None = None,
        size: int | None = None,
        ring_features: int = F_INDIRECT_DESC | F_EVENT_IDX,
    ) -> None:
        """Bring the device up: with all that it offers by default, and all of its queues."""
        if features is None:
            features = self.offered() & ~(F_INDIRECT_DESC | F_EVENT_IDX)
        assert self.negotiate(features | F_VERSION_1 | ring_features)
        for index in queues if queues is not None else range(len(self.device.model.queue_sizes)):
            self.set_up_queue(index, size)
        self.go()
        assert not self.needs_reset

    # -- interrupts ----------------------------------------------------------------------------------------------------

    async def interrupted(self) -> int:
        """Wait for an interrupt, acknowledge it, and return InterruptStatus."""
        await trio.lowlevel.wait_readable(self._irq)
        with suppress(BlockingIOError):
            os.eventfd_read(self._irq)
        causes = self.read(mmio.INTERRUPT_STATUS)
        self.write(mmio.INTERRUPT_ACK, causes)
        return causes

    def interrupts(self) -> int:
        """Return the interrupts that were signalled since the last look."""
        try:
            return os.eventfd_read(self._irq)
        except BlockingIOError:
            return 0

    async def failed(self) -> None:
        """Wait for the device to say that it needs a reset, as it must: with a configuration interrupt."""
        with trio.fail_after(WATCHDOG_SECONDS):
            causes = 0
            while not causes & INTERRUPT_CONFIG:
                causes = await self.interrupted()
        assert self.needs_reset


@asynccontextmanager
async def driven(
    model: DeviceModel, memory: Memory, *, with_it: Callable[[], Awaitable[None]] | None = None
) -> AsyncIterator[Driver]:
    """Yield a driver for a device that is being served, and ``with_it`` another task that is cancelled with that."""
    irq = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        with VirtioDevice(model, memory.accessor, lambda: os.eventfd_write(irq, 1), name="device0") as device:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(serve, device)
                if with_it is not None:
                    nursery.start_soon(with_it)
                yield Driver(memory, mmio.MmioTransport(device), irq)
                nursery.cancel_scope.cancel()
    finally:
        os.close(irq)
