from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from kvmd.virtio import mmio
from kvmd.virtio.abi import (
    F_ACCESS_PLATFORM,
    F_EVENT_IDX,
    F_INDIRECT_DESC,
    F_VERSION_1,
    INTERRUPT_CONFIG,
    DeviceId,
    Status,
)
from kvmd.virtio.activation import Activation
from kvmd.virtio.device import FAILURES_LOGGED, VirtioDevice
from kvmd.virtio.device_model import Host
from tests.virtio.driver import SIZE, Driver, Memory, guest_memory

LIMIT = 64
FEATURE = 1 << 3
FORBIDDEN = 1 << 4


class Model:
    """A device that does nothing."""

    device_id = DeviceId.ENTROPY
    queue_sizes = (LIMIT, LIMIT)
    features = FEATURE | FORBIDDEN
    config = bytes(range(1, 11))

    def __init__(self) -> None:
        self.host: Host | None = None

    def bind(self, host: Host) -> None:
        self.host = host

    def refusal(self, features: int) -> str | None:
        return "not these" if features & FORBIDDEN else None

    def config_written(self, offset: int, data: bytes) -> bytes | None:
        return None if offset else data + self.config[len(data) :]

    async def run(self, active: Activation) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


@pytest.fixture
def memory() -> Iterator[Memory]:
    with guest_memory() as memory:
        yield memory


@pytest.fixture
def driver(memory: Memory) -> Iterator[Driver]:
    """A device that nobody serves: registers alone."""
    irq = os.eventfd(0, os.EFD_NONBLOCK)
    with VirtioDevice(Model(), memory.accessor, lambda: os.eventfd_write(irq, 1), name="test") as device:
        yield Driver(memory, mmio.MmioTransport(device), irq)
    os.close(irq)


def test_the_registers_of_a_fresh_device(driver: Driver) -> None:
    assert driver.read(mmio.MAGIC_VALUE) == int.from_bytes(b"virt", "little")
    assert driver.read(mmio.VERSION_REGISTER) == 2
    assert driver.read(mmio.DEVICE_ID) == 4
    assert driver.read(mmio.VENDOR_ID) == int.from_bytes(b"KVMd", "little")
    assert driver.offered() == FEATURE | FORBIDDEN | F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX
    driver.write(mmio.DEVICE_FEATURES_SEL, 2)
    assert driver.read(mmio.DEVICE_FEATURES) == 0
    assert driver.status == 0
    assert driver.read(mmio.INTERRUPT_STATUS) == 0
    assert driver.read(mmio.SHM_LEN_LOW) == driver.read(mmio.SHM_LEN_LOW + 4) == 0xFFFFFFFF
    for index, limit in ((0, LIMIT), (1, LIMIT), (2, 0), (0xFFFFFFFF, 0)):
        driver.write(mmio.QUEUE_SEL, index)
        assert driver.read(mmio.QUEUE_NUM_MAX) == limit
        assert driver.read(mmio.QUEUE_READY) == 0


def test_memory_that_converts_is_for_drivers_that_say_which_memory_devices_may_touch() -> None:
    with guest_memory(converts=True) as memory:
        with VirtioDevice(Model(), memory.accessor, lambda: None, name="test") as device:
            assert device.offered & F_ACCESS_PLATFORM
        with VirtioDevice(Model(), memory.accessor, lambda: None, name="test", access_platform=False) as device:
            assert not device.offered & F_ACCESS_PLATFORM


def test_accesses_of_other_sizes_and_of_no_register_are_harmless(driver: Driver) -> None:
    for size in (1, 2, 8):
        assert driver.transport.read(mmio.MAGIC_VALUE, size) == bytes(size)
        driver.transport.write(mmio.STATUS, b"\x01" * size)
    assert driver.status == 0
    assert driver.read(0x0C4) == 0
    driver.write(mmio.MAGIC_VALUE, 7)
    driver.write(0x0C4, 7)
    assert driver.read(mmio.MAGIC_VALUE) == mmio.MAGIC


def test_negotiation_succeeds_with_what_was_offered(driver: Driver) -> None:
    assert driver.negotiate(F_VERSION_1 | FEATURE)
    driver.write(mmio.DRIVER_FEATURES_SEL, 0)
    driver.write(mmio.DRIVER_FEATURES, 0)
    assert driver.device.accepted == F_VERSION_1 | FEATURE, "nothing changes after FEATURES_OK"


@pytest.mark.parametrize(
    ("features", "reason"),
    [
        (FEATURE, "a legacy driver: it does not accept VIRTIO_F_VERSION_1"),
        (F_VERSION_1 | 1 << 20, "the driver accepts features that were not offered: 0x100000"),
        (F_VERSION_1 | 1 << 60, "the driver accepts features that were not offered: 0x1000000000000000"),
        (F_VERSION_1 | FORBIDDEN, "not these"),
    ],
)
def test_features_that_cannot_be_are_refused(driver: Driver, features: int, reason: str) -> None:
    with capture_logs() as logs:
        assert not driver.negotiate(features)
    assert [(line["event"], line["reason"]) for line in logs] == [("virtio driver refused", reason)]
    assert driver.status == Status.ACKNOWLEDGE | Status.DRIVER
    driver.go()
    assert driver.needs_reset, "DRIVER_OK all the same is a failure"
    assert driver.negotiate(F_VERSION_1), "and a reset a new beginning"


def test_a_legacy_driver_that_skips_features_ok_is_refused(driver: Driver) -> None:
    driver.write(mmio.STATUS, Status.ACKNOWLEDGE | Status.DRIVER | Status.DRIVER_OK)
    assert driver.needs_reset
    assert driver.device.activation is None


def test_only_a_reset_clears_status_bits(driver: Driver) -> None:
    driver.negotiate(F_VERSION_1)
    driver.write(mmio.STATUS, Status.ACKNOWLEDGE)
    assert driver.status == Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK
    driver.write(mmio.STATUS, 0xFFFFFF00 | Status.NEEDS_RESET)
    assert not driver.needs_reset, "that bit is the device's"
    driver.write(mmio.STATUS, 0)
    assert driver.status == 0


def test_queues_are_set_up_between_features_ok_and_driver_ok(driver: Driver) -> None:
    driver.negotiate(F_VERSION_1)
    queue = driver.set_up_queue(1, 32)
    assert driver.read(mmio.QUEUE_READY) == 1
    driver.write(mmio.QUEUE_NUM, 8)
    driver.go()
    activation = driver.device.activation
    assert activation is not None
    assert list(activation.queues) == [1]
    assert activation.queues[1].size == 32, "a queue that is ready does not change any more"
    driver.place_queue(0, 32, (queue.table, queue.avail, queue.used))
    assert driver.needs_reset
    assert driver.device.activation is None


@pytest.mark.parametrize(
    ("size", "addresses", "reason"),
    [
        (0, (0, 0, 0), "queue 0 of 0 descriptors: there may be 64"),
        (65, (0, 0, 0), "queue 0 of 65 descriptors: there may be 64"),
        (0xFFFFFFFF, (0, 0, 0), "queue 0 of 4294967295 descriptors: there may be 64"),
        (3, (0, 0, 0), "queue 0: a queue of 3 descriptors: it must be a power of 2 up to 32768"),
        (8, (8, 0, 0), "queue 0: the descriptor table at 0x8 is not aligned to 16 bytes"),
        (8, (0, 1, 0), "queue 0: the available ring at 0x1 is not aligned to 2 bytes"),
        (8, (0, 0, 2), "queue 0: the used ring at 0x2 is not aligned to 4 bytes"),
    ],
)
def test_a_queue_that_cannot_be_fails_the_device(
    driver: Driver, size: int, addresses: tuple[int, int, int], reason: str
) -> None:
    driver.negotiate(F_VERSION_1)
    with capture_logs() as logs:
        driver.place_queue(0, size, addresses)
    assert [line["reason"] for line in logs] == [reason]
    assert driver.needs_reset
    assert driver.interrupts() == 0, "no interrupt before DRIVER_OK (clause 2.1.2)"


def test_a_queue_may_be_taken_down_and_set_up_anew(driver: Driver) -> None:
    driver.negotiate(F_VERSION_1)
    driver.set_up_queue(0)
    driver.write(mmio.QUEUE_READY, 0)
    assert driver.read(mmio.QUEUE_READY) == 0
    driver.set_up_queue(0, 8)
    assert driver.read(mmio.QUEUE_READY) == 1
    driver.go()
    activation = driver.device.activation
    assert activation is not None
    driver.write(mmio.QUEUE_READY, 0)
    assert driver.read(mmio.QUEUE_READY) == 0
    assert activation.queues[0].stopped, "while in use, too: nothing of it is touched any more"
    assert not driver.needs_reset
    driver.write(mmio.QUEUE_SEL, 7)
    driver.write(mmio.QUEUE_READY, 0)
    driver.start(F_VERSION_1)


def test_failure_is_told_once_and_ends_with_a_reset(driver: Driver) -> None:
    driver.start(F_VERSION_1)
    with capture_logs() as logs:
        driver.device.fail("a reason")
        driver.device.fail("another reason")
    assert [line["reason"] for line in logs] == ["a reason"]
    assert driver.needs_reset
    assert driver.read(mmio.INTERRUPT_STATUS) == INTERRUPT_CONFIG
    assert driver.interrupts() == 1
    driver.start(F_VERSION_1)
    assert driver.read(mmio.INTERRUPT_STATUS) == 0


def test_a_guest_that_fails_devices_for_ever_does_not_fill_the_log(driver: Driver) -> None:
    with capture_logs() as logs:
        for _ in range(3 * FAILURES_LOGGED):
            driver.start(F_VERSION_1)
            driver.device.fail("a reason")
    assert len(logs) == FAILURES_LOGGED
    assert "not logged" in logs[-1]["note"]
    assert driver.device.failures == 3 * FAILURES_LOGGED


def test_what_an_activation_says_after_a_reset_is_no_news_to_the_next(driver: Driver) -> None:
    driver.start(F_VERSION_1)
    old = driver.device.activation
    assert old is not None
    driver.start(F_VERSION_1)
    old.fail("too late")
    old.interrupt()
    assert not driver.needs_reset
    assert driver.read(mmio.INTERRUPT_STATUS) == 0
    assert driver.interrupts() == 0


def test_the_configuration_and_its_generation(driver: Driver) -> None:
    assert driver.config(0, 4) == b"\1\2\3\4"
    assert driver.config(8, 4) == b"\x09\x0a\0\0", "zeros past its end"
    assert driver.config(0xF0, 8) == bytes(8)
    before = driver.read(mmio.CONFIG_GENERATION)
    driver.device.set_config(b"changed")
    assert driver.read(mmio.CONFIG_GENERATION) != before
    assert driver.config(0, 8) == b"changed\0"
    assert driver.interrupts() == 0, "nobody drives it yet"
    driver.start(F_VERSION_1)
    driver.device.set_config(b"changed again")
    assert driver.read(mmio.INTERRUPT_STATUS) == INTERRUPT_CONFIG
    driver.write(mmio.INTERRUPT_ACK, INTERRUPT_CONFIG)
    assert driver.read(mmio.INTERRUPT_STATUS) == 0


def test_the_configuration_is_written_where_the_device_lets_it(driver: Driver) -> None:
    driver.transport.write(mmio.CONFIG, b"\xaa\xbb")
    driver.transport.write(mmio.CONFIG + 2, b"\xcc")
    driver.transport.write(mmio.CONFIG + 9, b"\xcc\xcc")
    driver.transport.write(mmio.CONFIG + 0xF0, b"\xcc")
    assert driver.config(0, 10) == b"\xaa\xbb\3\4\5\6\7\x08\x09\x0a"


def test_a_notification_without_an_ioeventfd_goes_to_its_queue(driver: Driver) -> None:
    driver.write(mmio.QUEUE_NOTIFY, 1)
    driver.write(mmio.QUEUE_NOTIFY, 2)
    driver.write(mmio.QUEUE_NOTIFY, 0xFFFFFFFF)
    assert os.eventfd_read(driver.device.notified[1]) == 1
    with pytest.raises(BlockingIOError):
        os.eventfd_read(driver.device.notified[0])


ACCESSES = st.one_of(
    st.tuples(
        st.sampled_from([value for name, value in vars(mmio).items() if name.isupper() and isinstance(value, int)]),
        st.one_of(st.sampled_from([0, 1, 2, 4, 8, 15, 0x40, 0x80, 0xFFFFFFFF, SIZE]), st.integers(0, 0xFFFFFFFF)),
    ),
    st.tuples(st.integers(0, mmio.REGION_BYTES - 4), st.integers(0, 0xFFFFFFFF)),
)


@given(st.lists(ACCESSES, max_size=60))
def test_any_accesses_leave_a_device_that_a_reset_revives(accesses: list[tuple[int, int]]) -> None:
    irq = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        with (
            guest_memory() as memory,
            capture_logs(),
            VirtioDevice(Model(), memory.accessor, lambda: os.eventfd_write(irq, 1), name="test") as device,
        ):
            driver = Driver(memory, mmio.MmioTransport(device), irq)
            for offset, value in accesses:
                driver.write(offset, value)
                for size in (1, 2, 4):
                    assert len(driver.transport.read(offset, size)) == size
            driver.start(F_VERSION_1)
    finally:
        os.close(irq)
