import threading

import pytest

from kvmd.devices.ports import UNCLAIMED_KEPT, PortBus


class Registers:
    def __init__(self, count: int) -> None:
        self.bytes = bytearray(count)

    def read(self, offset: int) -> int:
        return self.bytes[offset]

    def write(self, offset: int, value: int) -> None:
        self.bytes[offset] = value


@pytest.fixture
def device() -> Registers:
    return Registers(8)


@pytest.fixture
def bus(device: Registers) -> PortBus:
    bus = PortBus()
    bus.add(0x3F8, 8, device)
    return bus


def test_a_byte_goes_to_the_register_of_its_port(bus: PortBus, device: Registers) -> None:
    bus.write(0x3FF, b"\x5a")
    assert device.bytes[7] == 0x5A
    assert bus.read(0x3FF, 1) == b"\x5a"
    assert bus.unclaimed == 0


def test_a_wide_access_is_one_to_each_port_lowest_first(bus: PortBus, device: Registers) -> None:
    bus.write(0x3F8, b"\x01\x02\x03\x04")
    bus.write(0x3FD, b"\x05\x06")
    assert bytes(device.bytes) == b"\x01\x02\x03\x04\x00\x05\x06\x00"
    assert bus.read(0x3F8, 2) == b"\x01\x02"
    assert bus.read(0x3F8, 4) == b"\x01\x02\x03\x04"


def test_where_nothing_answers_reads_are_all_ones_and_writes_are_ignored(bus: PortBus) -> None:
    assert bus.read(0x80, 4) == b"\xff\xff\xff\xff"
    bus.write(0x80, b"\x00\x00")
    bus.write(0x60, b"\x00")
    assert bus.unclaimed == 3
    assert bus.unclaimed_ports == (0x80, 0x60)


def test_an_access_that_leaves_a_device_is_counted_once(bus: PortBus) -> None:
    bus.write(0x3FF, b"\x11")
    assert bus.read(0x3FF, 4) == b"\x11\xff\xff\xff"
    assert bus.unclaimed == 1
    assert bus.unclaimed_ports == (0x400,)


def test_an_access_past_the_last_port_reads_ones(bus: PortBus) -> None:
    assert bus.read(0xFFFF, 4) == b"\xff" * 4
    bus.write(0xFFFE, b"\x00" * 4)
    assert bus.unclaimed == 2


def test_only_the_first_unclaimed_ports_are_remembered(bus: PortBus) -> None:
    for port in range(2 * UNCLAIMED_KEPT):
        bus.read(port, 1)
    assert bus.unclaimed == 2 * UNCLAIMED_KEPT
    assert bus.unclaimed_ports == tuple(range(UNCLAIMED_KEPT))


@pytest.mark.parametrize(("first", "count"), [(0, 0), (-1, 2), (0xFFFF, 2), (5, -1)])
def test_a_range_that_is_none_is_refused(bus: PortBus, device: Registers, first: int, count: int) -> None:
    with pytest.raises(ValueError, match="not a range"):
        bus.add(first, count, device)


def test_two_devices_cannot_claim_one_port(bus: PortBus) -> None:
    with pytest.raises(ValueError, match="0x3f8 belongs"):
        bus.add(0x3F0, 9, Registers(9))
    assert bus.read(0x3F0, 1) == b"\xff"


def test_unclaimed_accesses_of_many_threads_are_all_counted(bus: PortBus) -> None:
    def access() -> None:
        for _ in range(500):
            bus.read(0x80, 1)

    threads = [threading.Thread(target=access) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert bus.unclaimed == 2000
