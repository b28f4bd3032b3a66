from __future__ import annotations

import threading

from kvmd.devices.mmio import ADDRESSES_KEPT, MmioCounter


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
