"""Virtio over MMIO: the register file of clause 4.2.2 of virtio 1.2, version 2."""

from __future__ import annotations

from collections.abc import Callable

from kvmd.virtio.device import VirtioDevice
from kvmd.virtio.queue_setup import QueueSetup

REGION_BYTES = 0x200
"""Size of a device's region. The configuration, from 0x100 on, takes at most 60 bytes of it."""

MAGIC = 0x74726976
VERSION = 2
VENDOR = 0x644D564B
"""``KVMd``, lowest byte first."""

MAGIC_VALUE = 0x000
VERSION_REGISTER = 0x004
DEVICE_ID = 0x008
VENDOR_ID = 0x00C
DEVICE_FEATURES = 0x010
DEVICE_FEATURES_SEL = 0x014
DRIVER_FEATURES = 0x020
DRIVER_FEATURES_SEL = 0x024
QUEUE_SEL = 0x030
QUEUE_NUM_MAX = 0x034
QUEUE_NUM = 0x038
QUEUE_READY = 0x044
QUEUE_NOTIFY = 0x050
"""Where the ioeventfds go: 4 bytes, data match on the queue's index."""
INTERRUPT_STATUS = 0x060
INTERRUPT_ACK = 0x064
STATUS = 0x070
QUEUE_DESC_LOW = 0x080
QUEUE_DRIVER_LOW = 0x090
QUEUE_DEVICE_LOW = 0x0A0
SHM_LEN_LOW = 0x0B0
SHM_BASE_HIGH = 0x0BC
CONFIG_GENERATION = 0x0FC
CONFIG = 0x100

_REGISTER_BYTES = 4
_LOW = 0xFFFFFFFF
_QUEUE_ADDRESSES = {QUEUE_DESC_LOW: 0, QUEUE_DRIVER_LOW: 1, QUEUE_DEVICE_LOW: 2}


class MmioTransport:
    """The registers of one device; any vCPU thread may call it.

    The selectors are the driver's own: one that selects from two processors at once confuses only itself.

    Args:
        device: what is behind them.
    """

    def __init__(self, device: VirtioDevice) -> None:
        self.device = device
        self._device_half = 0
        self._driver_half = 0
        self._queue = 0
        self._reads: dict[int, Callable[[], int]] = {
            MAGIC_VALUE: lambda: MAGIC,
            VERSION_REGISTER: lambda: VERSION,
            DEVICE_ID: lambda: int(device.model.device_id),
            VENDOR_ID: lambda: VENDOR,
            DEVICE_FEATURES: self._device_features,
            QUEUE_NUM_MAX: self._queue_limit,
            QUEUE_READY: self._queue_ready,
            INTERRUPT_STATUS: lambda: device.interrupts,
            STATUS: lambda: device.status,
            CONFIG_GENERATION: lambda: device.config_generation,
        }

    # -- reads ---------------------------------------------------------------------------------------------------------

    def read(self, offset: int, size_bytes: int) -> bytes:
        """Return what a load of that size reads. Registers are 32 bits; any other access of them reads zeros."""
        if offset >= CONFIG:
            return self.device.read_config(offset - CONFIG, size_bytes)
        if size_bytes != _REGISTER_BYTES:
            return bytes(size_bytes)
        if SHM_LEN_LOW <= offset <= SHM_BASE_HIGH:
            return b"\xff" * _REGISTER_BYTES  # there is no shared memory region (clause 4.2.2)
        register = self._reads.get(offset)
        return (0 if register is None else register()).to_bytes(_REGISTER_BYTES, "little")

    def _device_features(self) -> int:
        return self.device.offered >> (32 * self._device_half) & _LOW if self._device_half <= 1 else 0

    def _queue_limit(self) -> int:
        queues = self.device.queues
        return queues[self._queue].limit if self._queue < len(queues) else 0

    def _queue_ready(self) -> int:
        queues = self.device.queues
        return int(queues[self._queue].ready) if self._queue < len(queues) else 0

    # -- writes --------------------------------------------------------------------------------------------------------

    def write(self, offset: int, data: bytes) -> None:  # noqa: C901, PLR0912 - one case a register
        """Take a store. Registers are 32 bits; any other access of them, and of one that is read-only, is ignored.

        Quick, but for the reset of a device with I/O under way: see ``VirtioDevice.set_status``.
        """
        if offset >= CONFIG:
            self.device.write_config(offset - CONFIG, data)
            return
        if len(data) != _REGISTER_BYTES:
            return
        value = int.from_bytes(data, "little")
        device = self.device
        match offset:
            case 0x050:  # QUEUE_NOTIFY
                device.notify(value)
            case 0x064:  # INTERRUPT_ACK
                device.acknowledge(value)
            case 0x070:  # STATUS
                device.set_status(value)
            case 0x014:  # DEVICE_FEATURES_SEL
                self._device_half = value
            case 0x020:  # DRIVER_FEATURES
                device.accept(self._driver_half, value)
            case 0x024:  # DRIVER_FEATURES_SEL
                self._driver_half = value
            case 0x030:  # QUEUE_SEL
                self._queue = value
            case 0x038:  # QUEUE_NUM
                device.set_queue(self._queue, lambda queue: setattr(queue, "size", value))
            case 0x044:  # QUEUE_READY
                device.set_ready(self._queue, ready=bool(value))
            case _:
                part = _QUEUE_ADDRESSES.get(offset & ~4)
                if part is not None:
                    self._set_address(part, value, high=bool(offset & 4))

    def _set_address(self, part: int, value: int, *, high: bool) -> None:
        def change(queue: QueueSetup) -> None:
            old = queue.addresses[part]
            queue.addresses[part] = old & _LOW | value << 32 if high else old & ~_LOW | value

        self.device.set_queue(self._queue, change)
