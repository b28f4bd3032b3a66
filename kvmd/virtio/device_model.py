"""What makes a virtio device a disk, a network card or another: what ``kvmd.virtio.device`` asks of each."""

from __future__ import annotations

from typing import Protocol

from kvmd.virtio.abi import DeviceId
from kvmd.virtio.activation import Activation


class Host(Protocol):
    """The device, as its model sees it, to change the configuration. Thread-safe, never blocks."""

    def set_config(self, config: bytes, *, tell: bool = True) -> None:
        """Replace the configuration, and tell the driver."""


class DeviceModel(Protocol):
    """What kind of device it is, and what it does with its queues."""

    @property
    def device_id(self) -> DeviceId:
        """Its type."""

    @property
    def queue_sizes(self) -> tuple[int, ...]:
        """The largest size of each of its queues, in descriptors."""

    @property
    def features(self) -> int:
        """Feature bits of this type of device that are offered."""

    @property
    def config(self) -> bytes:
        """The configuration to begin with, also after a reset."""

    def bind(self, host: Host) -> None:
        """Take the way to change the configuration. Called once, before anything else."""

    def refusal(self, features: int) -> str | None:
        """Return why this choice of features cannot be, or None. Called in a vCPU's thread."""

    def config_written(self, offset: int, data: bytes) -> bytes | None:
        """Take what the driver writes to the configuration, and return the new one, if it changes.

        Called in a vCPU's thread with the registers' lock held.
        """

    async def run(self, active: Activation) -> None:
        """Serve the queues until cancelled.

        Raises:
            QueueStopped: the device was reset, or has failed.
        """

    def close(self) -> None:
        """Give up what it holds; harmless the second time."""


class PlainModel:
    """What most models are: the configuration stays as it is, and any choice of features will do."""

    def bind(self, host: Host) -> None:
        """Nothing of the configuration ever changes."""

    def refusal(self, features: int) -> str | None:  # noqa: ARG002 - the protocol has it
        """Any choice of features will do."""
        return None

    def config_written(self, offset: int, data: bytes) -> bytes | None:  # noqa: ARG002 - the protocol has them
        """Nothing of the configuration can be written."""
        return None
