from __future__ import annotations

import os
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

import pytest
import trio

from kvmd.virtio.net import (
    NetworkDevice,
)
from tests.virtio.driver import WATCHDOG_SECONDS, Driver, Memory, driven, guest_memory

MAC = bytes.fromhex("02aabbccddee")
HEADER = bytes(10) + b"\0\0"


@dataclass
class Wire:
    """A socket pair that keeps frames apart: ``fd`` is the device's end, ``far`` is the test's."""

    near: socket.socket
    far: socket.socket
    has_header: bool
    offloads: list[dict[str, bool]] = field(default_factory=list)
    refuses: bool = False

    @property
    def fd(self) -> int:
        return self.near.fileno()

    def set_offloads(self, **offloads: bool) -> None:
        if self.refuses:
            raise OSError(22, "Invalid argument")
        self.offloads.append(offloads)

    def close(self) -> None:
        self.near.close()


def wire(*, has_header: bool = True) -> Wire:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (near, far):
        end.settimeout(0)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    return Wire(near, far, has_header)


class Net:
    """Frames on queues 0 and 1."""

    def __init__(self, driver: Driver, memory: Memory, wire_: Wire, model: NetworkDevice) -> None:
        self.driver = driver
        self.memory = memory
        self.wire = wire_
        self.model = model
        self.buffers: dict[int, tuple[int, int]] = {}

    def offer_buffers(self, count: int, size_bytes: int) -> None:
        queue = self.driver.queues[0]
        for _ in range(count):
            gpa = self.memory.allocate(size_bytes)
            self.buffers[queue.offer((), [(gpa, size_bytes)])] = (gpa, size_bytes)
        queue.kick()

    async def received(self) -> bytes:
        """Wait for a frame, and return it with its header."""
        queue = self.driver.queues[0]
        used: list[tuple[int, int]] = []
        frame = b""
        count = 0
        with trio.fail_after(WATCHDOG_SECONDS):
            while not count or len(used) < count:
                used += await queue.completed(1)
                if not count:
                    gpa, _ = self.buffers[used[0][0]]
                    (count,) = struct.unpack("<H", self.memory.read(gpa + 10, 2))
        assert len(used) == count
        for head, written in used:
            gpa, size_bytes = self.buffers.pop(head)
            assert written <= size_bytes
            frame += self.memory.read(gpa, written)
        return frame

    def send(self, data: bytes, parts: int = 1, *, indirect: bool = False) -> None:
        gpa = self.memory.allocate(len(data))
        self.memory.write(gpa, data)
        step = -(-len(data) // parts)
        pieces = [(gpa + at, min(step, len(data) - at)) for at in range(0, len(data), step)]
        self.driver.queues[1].offer(pieces, indirect=indirect)
        self.driver.queues[1].kick()

    async def on_the_wire(self) -> bytes:
        with trio.fail_after(WATCHDOG_SECONDS):
            await trio.lowlevel.wait_readable(self.wire.far)
        return self.wire.far.recv(1 << 17)


@pytest.fixture(params=[False, True], ids=["plain", "converting"])
def memory(request: pytest.FixtureRequest) -> Iterator[Memory]:
    with guest_memory(converts=request.param) as memory:
        yield memory


@pytest.fixture
async def net(memory: Memory) -> AsyncIterator[Net]:
    ends = wire()
    with ends.far:
        model = NetworkDevice(ends, MAC, mtu=1400)
        async with driven(model, memory) as driver:
            yield Net(driver, memory, ends, model)


@pytest.mark.parametrize("indirect", [False, True])
async def test_a_frame_goes_out_with_its_header_however_it_is_cut(net: Net, *, indirect: bool) -> None:
    net.driver.start()
    for parts in (1, 2, 7):
        frame = HEADER + os.urandom(1414)
        net.send(frame, parts, indirect=indirect)
        assert await net.on_the_wire() == frame
        ((_, written),) = await net.driver.queues[1].completed()
        assert written == 0


async def test_a_frame_comes_in_merged_over_as_many_buffers_as_it_needs(net: Net) -> None:
    net.driver.start()
    net.offer_buffers(64, 2048)
    for size in (60, 1414, 2036, 2037, 65550):
        payload = os.urandom(size)
        net.wire.far.send(bytes([1, 1]) + bytes(10) + payload)
        frame = await net.received()
        assert frame[12:] == payload
        assert frame[:2] == b"\x01\x01"
        assert struct.unpack("<H", frame[10:12])[0] == -(-(size + 12) // 2048)
        net.offer_buffers(-(-(size + 12) // 2048), 2048)
    assert net.model.dropped == 0
