"""A queue before DRIVER_OK: what the driver has said of it so far, and whether that can be."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvmd.virtio.abi import F_EVENT_IDX, F_INDIRECT_DESC
from kvmd.virtio.memory import GuestMemory
from kvmd.virtio.split_queue import QueueError, SplitQueue


@dataclass(slots=True)
class QueueSetup:
    """What the driver said of one queue.

    Attributes:
        index: its number in the device.
        limit: its largest size.
        size: descriptors, as the driver chose.
        addresses: gpas of the descriptor table, the driver's and the device's ring.
        ready: whether it is set up.
    """

    index: int
    limit: int
    size: int
    addresses: list[int] = field(default_factory=lambda: [0, 0, 0])
    ready: bool = False

    def problem(self, memory: GuestMemory) -> str | None:
        """Return why there cannot be such a queue, or None."""
        if not 1 <= self.size <= self.limit:
            return f"queue {self.index} of {self.size} descriptors: there may be {self.limit}"
        try:
            self.rings(memory, 0)
        except QueueError as error:
            return f"queue {self.index}: {error}"
        return None

    def rings(self, memory: GuestMemory, features: int) -> SplitQueue:
        """Return the rings, as they work with these features.

        Raises:
            QueueError: they cannot be where the driver says.
        """
        table, driver, device = self.addresses
        return SplitQueue(
            memory,
            self.size,
            (table, driver, device),
            indirect_limit=self.limit if features & F_INDIRECT_DESC else 0,
            event_idx=bool(features & F_EVENT_IDX),
        )
