from __future__ import annotations

import threading

import pytest

from kvmd.devices.mmio import ADDRESSES_KEPT, MmioBus, MmioCounter
from kvmd.ranges import GpaRange


def test_nothing_is_counted_at_first() -> None:
    counter = MmioCounter()
    assert counter.unclaimed == 0
    assert counter.unclaimed_addresses == ()


def test_accesses_are_counted_and_addresses_remembered_once_in_order() -> None:
    counter = MmioCounter()
    for gpa in (0x9000, 0x1000, 0x9000, 0x1001):
        counter.count(gpa)
    assert counter.unclaimed == 4
    assert counter.unclaimed_addresses == (0x9000, 0x1000, 0x1001)


def test_a_guest_that_touches_everything_costs_no_more_memory() -> None:
    counter = MmioCounter()
    for gpa in range(1000):
        counter.count(gpa)
    assert counter.unclaimed == 1000
    assert counter.unclaimed_addresses == tuple(range(ADDRESSES_KEPT))
    seen = counter.unclaimed_addresses
    counter.count(1 << 50)
    assert seen == counter.unclaimed_addresses


def test_no_access_of_several_vcpus_is_lost() -> None:
    counter = MmioCounter()
    start = threading.Barrier(4)

    def vcpu() -> None:
        start.wait()
        for gpa in range(2000):
            counter.count(gpa % 5)

    threads = [threading.Thread(target=vcpu) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counter.unclaimed == 8000
    assert sorted(counter.unclaimed_addresses) == [0, 1, 2, 3, 4]


class Register:
    """A device that is only told apart."""

    def read(self, offset: int, size_bytes: int) -> bytes:
        return bytes([offset & 0xFF]) * size_bytes

    def write(self, offset: int, data: bytes) -> None:
        raise NotImplementedError


def test_an_access_goes_to_the_device_whose_window_holds_all_of_it() -> None:
    bus, low, high = MmioBus(), Register(), Register()
    bus.add(GpaRange(0x3000, 0x4000), high)
    bus.add(GpaRange(0x1000, 0x2000), low)
    assert bus.find(0x1000, 4) == (low, 0)
    assert bus.find(0x3FFC, 4) == (high, 0xFFC)
    for gpa in (0x0, 0xFFF, 0x1FFE, 0x2000, 0x3FFD, 0x4000, 1 << 47):
        assert bus.find(gpa, 4) is None


@pytest.mark.parametrize("window", [(0x1000, 0x2000), (0x0, 0x2000), (0x1000, 0x3000), (0x0, 0x4000)])
def test_windows_do_not_overlap(window: tuple[int, int]) -> None:
    bus = MmioBus()
    bus.add(GpaRange(0x1000, 0x3000), Register())
    with pytest.raises(ValueError, match="belong to another device"):
        bus.add(GpaRange(*window), Register())
