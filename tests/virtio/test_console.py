"""The port of an agent: what the guest's driver and a program on the host see of each other."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from kvmd.errors import DeviceInUse
from kvmd.virtio.console import F_MULTIPORT, ConsoleDevice
from kvmd.virtio.console_control import Event, PortControl
from kvmd.virtio.host_port import HostPort
from tests.virtio.driver import Driver, Memory, driven, guest_memory

NAME = "org.qemu.guest_agent.0"


def control(event: Event, value: int, *, port: int = 1) -> bytes:
    return struct.pack("<IHH", port, event, value)


@pytest.fixture(params=[False, True], ids=["plain", "converting"])
def memory(request: pytest.FixtureRequest) -> Iterator[Memory]:
    with guest_memory(converts=request.param) as memory:
        yield memory


class Guest:
    """A driver that does what Linux' does, and a program that opens the port."""

    def __init__(self, driver: Driver, memory: Memory) -> None:
        self.driver = driver
        self.memory = memory
        self.buffer = memory.allocate(65536, 4096)

    async def tell(self, message: bytes) -> None:
        self.say(message, queue=3)
        await self.said(queue=3)

    async def hear(self) -> bytes:
        """Wait for a control message."""
        return await self.take(2, 512)

    def say(self, data: bytes, *, queue: int = 5) -> None:
        self.memory.write(self.buffer, data)
        self.driver.queues[queue].offer([(self.buffer, len(data))])
        self.driver.queues[queue].kick()

    async def said(self, *, queue: int = 5) -> None:
        """Wait until the device is done with what was said."""
        await self.driver.queues[queue].completed()

    async def take(self, queue: int, size_bytes: int) -> bytes:
        """Offer a buffer, and return what is in it when it comes back."""
        gpa = self.memory.allocate(size_bytes)
        self.driver.queues[queue].offer((), [(gpa, size_bytes)])
        self.driver.queues[queue].kick()
        ((_, written),) = await self.driver.queues[queue].completed()
        return self.memory.read(gpa, written)

    async def meet(self) -> None:
        """Come to know the port, as Linux does when the driver is loaded."""
        self.driver.start()
        assert self.driver.config(4, 4) == struct.pack("<I", 2)
        await self.tell(control(Event.DEVICE_READY, 1, port=0))
        assert await self.hear() == control(Event.PORT_ADD, 1)
        await self.tell(control(Event.PORT_READY, 1))
        assert await self.hear() == control(Event.PORT_NAME, 1) + NAME.encode()


async def test_both_sides_see_each_other_come_and_go_and_bytes_go_both_ways(memory: Memory) -> None:
    port = HostPort()
    async with driven(ConsoleDevice(port, NAME), memory) as driver, trio.open_nursery() as nursery:
        guest = Guest(driver, memory)
        await guest.meet()
        with port.attach() as host:
            assert await guest.hear() == control(Event.PORT_OPEN, 1)
            nursery.start_soon(host.send, b"hello from the host")
            await trio.testing.wait_all_tasks_blocked()
            await guest.tell(control(Event.PORT_OPEN, 1))
            assert await guest.take(4, 11) == b"hello from "
            assert await guest.take(4, 100) == b"the host"
            guest.say(b"hello from the guest")
            assert await host.receive() == b"hello from the guest"
            await guest.said()
            with pytest.raises(DeviceInUse, match="one connection at a time"):
                port.attach()
        assert await guest.hear() == control(Event.PORT_OPEN, 0)
        guest.say(b"to nobody")
        await guest.said()
        with port.attach() as host:
            assert await guest.hear() == control(Event.PORT_OPEN, 1)
            guest.say(b"to the next one")
            assert await host.receive() == b"to the next one"


async def test_what_is_sent_waits_for_a_program_in_the_guest_and_goes_with_its_sender(memory: Memory) -> None:
    port = HostPort()
    async with driven(ConsoleDevice(port, NAME), memory) as driver, trio.open_nursery() as nursery:
        guest = Guest(driver, memory)
        with port.attach() as host:
            with trio.move_on_after(0.01) as before_the_driver:
                await host.send(b"too early")
            assert before_the_driver.cancelled_caught
            await guest.meet()
            assert await guest.hear() == control(Event.PORT_OPEN, 1)
            await guest.tell(control(Event.PORT_OPEN, 1))
            # Half of it is in the guest when the sender leaves.
            nursery.start_soon(host.send, b"1234567890")
            assert await guest.take(4, 5) == b"12345"
        assert await guest.hear() == control(Event.PORT_OPEN, 0)
        with port.attach() as host:
            assert await guest.hear() == control(Event.PORT_OPEN, 1)
            nursery.start_soon(host.send, b"anew")
            assert await guest.take(4, 100) == b"anew"


async def test_what_the_guest_began_to_say_to_one_is_not_for_the_next(memory: Memory) -> None:
    port = HostPort()
    async with driven(ConsoleDevice(port, NAME), memory) as driver:
        guest = Guest(driver, memory)
        await guest.meet()
        pages = memory.allocate(1 << 17, 4096)
        memory.write(pages, b"a" * (1 << 16) + b"b" * (1 << 16))
        with port.attach() as host:
            driver.queues[5].offer([(pages, 1 << 17)])
            driver.queues[5].kick()
            assert set(await host.receive()) == {ord("a")}
            await trio.testing.wait_all_tasks_blocked()
        with port.attach() as host, trio.move_on_after(0.01) as nothing:
            await host.receive()
        assert nothing.cancelled_caught
        await driver.queues[5].completed()


async def test_a_driver_without_ports_has_a_console(memory: Memory) -> None:
    port = HostPort()
    async with driven(ConsoleDevice(port, NAME), memory) as driver, trio.open_nursery() as nursery:
        guest = Guest(driver, memory)
        driver.start(driver.offered() & ~F_MULTIPORT, queues=[0, 1])
        with port.attach() as host:
            nursery.start_soon(host.send, b"hello")
            assert await guest.take(0, 64) == b"hello"
            guest.say(b"yes?", queue=1)
            assert await host.receive() == b"yes?"


@pytest.mark.parametrize("message", [b"", b"\1\0\0\0\3\0\1"])
async def test_a_short_control_message_is_the_devices_failure(memory: Memory, message: bytes) -> None:
    async with driven(ConsoleDevice(HostPort(), NAME), memory) as driver:
        driver.start()
        gpa = memory.allocate(64)
        driver.queues[3].offer([(gpa, len(message))] if message else (), () if message else [(gpa, 8)])
        driver.queues[3].kick()
        await driver.failed()


async def test_a_short_buffer_for_control_messages_is_the_devices_failure(memory: Memory) -> None:
    async with driven(ConsoleDevice(HostPort(), NAME), memory) as driver:
        driver.start()
        guest = Guest(driver, memory)
        await guest.tell(control(Event.DEVICE_READY, 1, port=0))
        driver.queues[2].offer((), [(guest.buffer, 7)])
        driver.queues[2].kick()
        await driver.failed()


@given(st.lists(st.one_of(st.booleans(), st.binary(max_size=12), st.sampled_from([control(e, 1) for e in Event]))))
def test_what_is_to_be_told_is_bounded_and_ends_with_how_it_is(steps: list[bool | bytes]) -> None:
    state = PortControl("agent")
    is_open = False
    for step in steps:
        if isinstance(step, bool):
            is_open = step
            state.host(is_open=step)
        elif len(step) >= 8:
            state.received(step)
    told = []
    while (message := state.next()) is not None:
        told.append(message)
        state.told()
    assert len(told) <= 4
    openings = [message for message in told if struct.unpack_from("<IHH", message)[1] == Event.PORT_OPEN]
    if openings:
        assert openings[-1] == control(Event.PORT_OPEN, int(is_open))
