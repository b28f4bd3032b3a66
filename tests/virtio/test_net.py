from __future__ import annotations

import os
import socket
import struct
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import cast

import pytest
import trio
from structlog.testing import capture_logs

from kvmd.units import MIB
from kvmd.virtio.abi import F_VERSION_1, INTERRUPT_CONFIG
from kvmd.virtio.net import (
    F_CSUM,
    F_GUEST_CSUM,
    F_GUEST_ECN,
    F_GUEST_TSO4,
    F_HOST_ECN,
    F_HOST_TSO4,
    F_MAC,
    F_MRG_RXBUF,
    F_MTU,
    FRAME_LIMIT,
    FrameIo,
    NetworkDevice,
)
from tests.virtio.driver import WATCHDOG_SECONDS, Driver, Memory, driven, guest_memory
from tests.virtio.wire import MAC, Wire, wire

HEADER = bytes(12)


class Net:
    """Frames on queues 0 and 1."""

    def __init__(self, driver: Driver, memory: Memory, wire_: Wire, model: NetworkDevice) -> None:
        self.driver = driver
        self.memory = memory
        self.wire = wire_
        self.model = model
        self.buffers: dict[int, tuple[int, int]] = {}
        self.used: list[tuple[int, int]] = []

    def offer_buffers(self, count: int, size_bytes: int) -> None:
        queue = self.driver.queues[0]
        for _ in range(count):
            gpa = self.memory.allocate(size_bytes)
            self.buffers[queue.offer((), [(gpa, size_bytes)])] = (gpa, size_bytes)
        queue.kick()

    async def received(self) -> bytes:
        """Wait for a frame, and return it with its header."""
        queue = self.driver.queues[0]
        frame = b""
        count = 0
        with trio.fail_after(WATCHDOG_SECONDS):
            while not count or len(self.used) < count:
                if not self.used or count:
                    self.used += await queue.completed(1)
                gpa, _ = self.buffers[self.used[0][0]]
                (count,) = struct.unpack("<H", self.memory.read(gpa + 10, 2))
        frames, self.used = self.used[:count], self.used[count:]
        for head, written in frames:
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


def deliver(net: Net, payload: bytes) -> None:
    net.wire.far.send(bytes(12) + payload)


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


async def test_a_frame_comes_into_one_buffer_where_merging_was_not_negotiated(net: Net) -> None:
    net.driver.start(F_MAC)
    net.offer_buffers(2, 1526)
    for size in (60, 1514):
        payload = os.urandom(size)
        deliver(net, payload)
        frame = await net.received()
        assert frame[:12] == bytes(10) + b"\1\0", "num_buffers is 1 all the same (clause 5.1.6.4)"
        assert frame[12:] == payload


async def test_buffers_of_odd_parts(net: Net) -> None:
    net.driver.start(F_MAC)
    gpa = net.memory.allocate(2000)
    net.memory.write(gpa, b"\xff" * 2000)
    net.driver.queues[0].offer((), [(gpa, 4), (gpa + 4, 7), (gpa + 11, 1), (gpa + 12, 1900)])
    net.driver.queues[0].kick()
    deliver(net, b"payload")
    ((_, written),) = await net.driver.queues[0].completed()
    assert net.memory.read(gpa, written + 1) == bytes(10) + b"\1\0payload\xff"


async def test_frames_wait_where_they_came_from_until_there_are_buffers(net: Net) -> None:
    net.driver.start()
    for turn in range(3):
        deliver(net, b"frame %d" % turn)
    await trio.testing.wait_all_tasks_blocked(0.001)
    assert net.wire.near.recv(4096, socket.MSG_PEEK)[12:] == b"frame 0"
    net.offer_buffers(1, 2048)
    await trio.testing.wait_all_tasks_blocked(0.001)
    assert net.driver.queues[0].device_used_index == 0, "a frame of 64 KiB would not fit"
    net.offer_buffers(40, 2048)
    for turn in range(3):
        assert (await net.received())[12:] == b"frame %d" % turn
    assert net.model.dropped == 0


async def test_a_small_ring_takes_what_fits_and_no_more(net: Net) -> None:
    net.driver.start(size=4)
    net.offer_buffers(4, 2048)
    deliver(net, b"x" * 9000)
    deliver(net, b"y" * 3000)
    assert (await net.received())[12:] == b"y" * 3000
    assert net.model.dropped == 1


async def test_a_frame_that_is_too_long_for_its_buffer_is_dropped(net: Net) -> None:
    net.driver.start(F_MAC)
    net.offer_buffers(1, 100)
    deliver(net, b"x" * 89)
    deliver(net, b"y" * 88)
    assert (await net.received())[12:] == b"y" * 88
    assert net.model.dropped == 1


async def test_a_full_host_holds_the_guest_up_and_nothing_is_lost(net: Net) -> None:
    net.driver.start()
    count = 0
    with trio.fail_after(WATCHDOG_SECONDS):
        while True:
            net.send(HEADER + struct.pack("<I", count) + bytes(4096))
            count += 1
            await trio.testing.wait_all_tasks_blocked(0.0001)
            if net.driver.queues[1].device_used_index < count:
                break
            net.driver.queues[1].take_used()
    assert (await net.on_the_wire())[12:16] == struct.pack("<I", 0)
    for turn in range(1, count):
        assert (await net.on_the_wire())[12:16] == struct.pack("<I", turn)
    assert net.model.dropped == 0


async def test_frames_of_impossible_sizes_are_dropped(net: Net) -> None:
    net.driver.start()
    gpa = net.memory.allocate(MIB)
    net.driver.queues[1].offer([(gpa, FRAME_LIMIT + 1)])
    net.driver.queues[1].kick()
    net.send(HEADER + b"next")
    assert await net.on_the_wire() == HEADER + b"next"
    assert net.model.dropped == 1


async def test_a_frame_that_the_host_refuses_is_lost_and_told_once(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    net.driver.start()
    with capture_logs() as logs, monkeypatch.context() as patch:

        def refuse(_fd: int, _views: object) -> int:
            raise OSError(22, "Invalid argument")

        patch.setattr("os.writev", refuse)
        for _ in range(2):
            net.send(HEADER + b"refused")
            await net.driver.queues[1].completed()
    assert [line["problem"] for line in logs] == ["frames from the guest are dropped"]
    assert net.model.dropped == 2
    net.send(HEADER + b"next")
    assert await net.on_the_wire() == HEADER + b"next"


async def test_the_configuration_and_the_link(net: Net) -> None:
    assert net.driver.config(0, 12) == MAC + struct.pack("<HHH", 1, 1, 1400)
    net.driver.start()
    net.offer_buffers(40, 2048)
    net.model.set_link(up=False)
    with trio.fail_after(WATCHDOG_SECONDS):
        while await net.driver.interrupted() != INTERRUPT_CONFIG:
            pass
    assert net.driver.config(6, 2) == b"\0\0"
    deliver(net, b"lost")
    net.send(HEADER + b"lost")
    await net.driver.queues[1].completed()
    await trio.testing.wait_all_tasks_blocked(0.001)
    assert net.model.dropped == 2
    net.model.set_link(up=True)
    deliver(net, b"there")
    assert (await net.received())[12:] == b"there"
    net.send(HEADER + b"there")
    assert await net.on_the_wire() == HEADER + b"there"


async def test_a_host_s_side_that_ends_takes_the_link_down(net: Net) -> None:
    net.driver.start()
    net.offer_buffers(40, 2048)
    net.wire.far.close()
    with trio.fail_after(WATCHDOG_SECONDS):
        while await net.driver.interrupted() != INTERRUPT_CONFIG:
            pass
    assert not net.model.link_up
    assert not net.driver.needs_reset


async def test_offloads_are_what_was_negotiated(net: Net) -> None:
    net.driver.start(F_MAC | F_CSUM | F_HOST_TSO4)
    await trio.testing.wait_all_tasks_blocked(0.001)
    assert net.wire.offloads == [0]
    net.driver.start(F_MAC | F_GUEST_CSUM | F_GUEST_TSO4 | F_MRG_RXBUF)
    net.offer_buffers(1, 2048)
    await trio.testing.wait_all_tasks_blocked(0.001)
    assert net.wire.offloads[-2:] == [0, F_GUEST_CSUM | F_GUEST_TSO4]
    net.wire.refuses = True
    with capture_logs() as logs:
        net.driver.start(F_MAC)
        net.send(HEADER + b"works all the same")
        assert await net.on_the_wire() == HEADER + b"works all the same"
    assert [line["problem"] for line in logs] == ["its offloads cannot be set"]


@pytest.mark.parametrize("features", [F_GUEST_TSO4, F_HOST_TSO4, F_GUEST_CSUM | F_GUEST_ECN, F_CSUM | F_HOST_ECN])
async def test_offloads_stand_on_others(net: Net, features: int) -> None:
    assert net.driver.negotiate(F_VERSION_1 | F_MAC)
    assert not net.driver.negotiate(F_VERSION_1 | features)


@pytest.mark.parametrize("mac", [b"", bytes(5), bytes.fromhex("01aabbccddee"), b"\xff" * 6])
def test_macs_that_no_interface_has(mac: bytes) -> None:
    with pytest.raises(ValueError, match="is not the MAC address of one interface"):
        NetworkDevice(cast("FrameIo", None), mac)


async def test_frames_without_headers_where_the_host_has_none(memory: Memory) -> None:
    ends = wire()
    with ends.far:
        async with driven(model := NetworkDevice(ends, MAC, has_header=False), memory) as driver:
            assert not driver.offered() & (F_CSUM | F_GUEST_CSUM | F_GUEST_TSO4 | F_HOST_TSO4 | F_MTU)
            driver.start()
            net = Net(driver, memory, ends, model)
            net.send(HEADER + b"bare", 3)
            assert await net.on_the_wire() == b"bare"
            gpa = memory.allocate(3000)
            memory.write(gpa, b"\xff" * 3000)
            head = driver.queues[0].offer((), [(gpa, 5), (gpa + 5, 2995)])
            net.buffers[head] = (gpa, 3000)
            driver.queues[0].kick()
            ends.far.send(b"bare, too")
            assert await net.received() == bytes(10) + b"\1\0bare, too"


@pytest.mark.network
async def test_a_tap_in_a_network_namespace() -> None:
    command = ["unshare", "-n", sys.executable, "-m", "tests.virtio.tap_side"]
    root = Path(__file__).parent.parent.parent
    done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.split() == [b"arp", b"udp-to-host", b"udp-to-guest"]
