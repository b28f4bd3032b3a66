"""A virtio device in use, from one DRIVER_OK to the next reset: what its model works with."""

from __future__ import annotations

from typing import Protocol

from kvmd.virtio.live_queue import LiveQueue, QueueStopped, Standstill, Transfers
from kvmd.virtio.memory import GuestMemory


class Activated(Protocol):
    """The device, as an activation of it sees it: ``VirtioDevice``. The methods may be called from any thread."""

    @property
    def standstill(self) -> Standstill:
        """What may be done in a pause."""

    def fail(self, reason: str, of: Activation | None = None) -> None:
        """Stop until a reset, unless this activation is over."""

    def interrupt(self, activation: Activation) -> None:
        """Tell the driver that buffers were given back, unless this activation is over."""


class Activation:
    """A device in use: from DRIVER_OK until a reset.

    What an old activation has to say after a reset (its last interrupt, its failure) is no news to the new one, and
    dropped.

    Args:
        device: the device.
        features: what was negotiated.
        memory: guest memory.

    Attributes:
        features: what was negotiated.
        queues: by index; those that the driver did not set up are not there.
        memory: guest memory.
        transfers: I/O under way straight into guest memory.
        work: what worker threads have to do, and will have done soon: a pause waits for it.
        standstill: the device's.
    """

    __slots__ = ("_device", "_ended", "features", "memory", "queues", "standstill", "transfers", "work")

    def __init__(self, device: Activated, features: int, memory: GuestMemory) -> None:
        self._device = device
        self.features = features
        self.memory = memory
        self.queues: dict[int, LiveQueue] = {}
        self.transfers = Transfers()
        self.work = Transfers()
        self.standstill = device.standstill
        self._ended = False

    @property
    def ended(self) -> bool:
        """Whether the device was reset or failed since."""
        return self._ended

    def fail(self, reason: str) -> None:
        """Stop the device until a reset: the driver broke a rule. From any thread."""
        self._device.fail(reason, self)

    def interrupt(self) -> None:
        """Tell the driver that buffers were given back. From any thread."""
        self._device.interrupt(self)

    def queue(self, index: int) -> LiveQueue:
        """Return a queue that the device cannot do without.

        Raises:
            QueueStopped: the driver did not set it up, by which the device has failed.
        """
        queue = self.queues.get(index)
        if queue is None:
            self.fail(f"queue {index} was not set up before DRIVER_OK")
            raise QueueStopped
        return queue

    def end(self) -> None:
        """Say that it is over; the queues stop at once for everyone who is not within."""
        self._ended = True
        for queue in self.queues.values():
            queue.give_up()
