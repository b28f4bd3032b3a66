"""The virtio devices of a Linux machine: opened as its spec says, connected to its platform."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import trio

from kvmd.closing import Closing
from kvmd.devices.mmio import MmioBus
from kvmd.errors import BackendError, HostError
from kvmd.hardware import DevicePlace, Platform
from kvmd.memory.accessor import HostAccessor
from kvmd.spec.machine import MachineSpec
from kvmd.virtio.balloon import BalloonDevice
from kvmd.virtio.block import BlockDevice
from kvmd.virtio.console import ConsoleDevice
from kvmd.virtio.device import VirtioDevice
from kvmd.virtio.device_model import DeviceModel
from kvmd.virtio.disk import RawDisk
from kvmd.virtio.entropy import EntropyDevice
from kvmd.virtio.host_port import HostPort
from kvmd.virtio.mmio import QUEUE_NOTIFY, MmioTransport
from kvmd.virtio.net import NetworkDevice
from kvmd.virtio.serving import serve


def device_count(spec: MachineSpec) -> int:
    """Return how many virtio devices a machine has."""
    return len(spec.disks) + len(spec.networks) + spec.entropy + spec.balloon + bool(spec.agent)


class LinuxDevices(Closing):
    """All virtio devices of a machine, in the order of their places: disks, network cards, entropy, balloon, agent.

    Attributes:
        virtio: the devices, to be served.
        facts: for the first log line.
        balloon: the balloon, if there is one.
        agent: the host's end of the port, if there is one.
    """

    def __init__(self) -> None:
        self.virtio: list[VirtioDevice] = []
        self.facts: dict[str, object] = {}
        self.balloon: BalloonDevice | None = None
        self.agent: HostPort | None = None
        self._resources = ExitStack()

    @classmethod
    def open(
        cls, spec: MachineSpec, platform: Platform, memory: HostAccessor, bus: MmioBus, opened: Mapping[str, int]
    ) -> LinuxDevices:
        """Open what the spec asks for, and put it on the bus.

        Args:
            spec: of the machine.
            platform: what the devices are connected to.
            memory: the guest's.
            bus: where their registers go.
            opened: open files in place of those that the spec names, by key (``MachineSpec.files``).

        Raises:
            ConfigError: a disk cannot be had; nothing is left behind.
            HostError: a network cannot.
        """
        devices = cls()
        try:
            for place, (name, model) in zip(platform.places, devices._models(spec, memory, opened), strict=True):
                devices._add(name, model, place, memory, bus)
        except BaseException:
            devices.close()
            raise
        return devices

    async def serve(self) -> None:
        """Serve the queues of all devices until cancelled."""
        async with trio.open_nursery() as nursery:
            for device in self.virtio:
                nursery.start_soon(serve, device)

    async def pause(self) -> None:
        """Leave guest memory alone until ``resume``, once what is under way is done. No vCPU runs any more."""
        async with trio.open_nursery() as nursery:
            for device in self.virtio:
                nursery.start_soon(device.pause)

    def resume(self) -> None:
        """Go on, with what the guest asked for and what came for it meanwhile too."""
        for device in self.virtio:
            device.resume()

    def close(self) -> None:
        """Give up all of it, once nothing serves or uses it; harmless the second time.

        Raises:
            HostError: a network cannot be removed; the next start tries again.
        """
        self._resources.close()

    def _models(
        self, spec: MachineSpec, memory: HostAccessor, opened: Mapping[str, int]
    ) -> Sequence[tuple[str, DeviceModel]]:
        models: list[tuple[str, DeviceModel]] = []
        for index, disk in enumerate(spec.disks):
            raw = RawDisk(
                disk.path,
                read_only=disk.read_only,
                direct=disk.direct,
                opened=opened.get(f"disks[{index}].path"),
            )
            self._resources.callback(raw.close)
            models.append((f"disk{index}", BlockDevice(raw)))
        if spec.networks:
            from kvmd.network.networks import open_networks  # noqa: PLC0415 - pyroute2, where a network is asked for

            networks = self._resources.enter_context(open_networks(spec.networks, machine=spec.name))
            self.facts["networks"] = [network.facts for network in networks.guest]
            models += [
                (f"net{index}", NetworkDevice(network.tap, network.mac, network.mtu))
                for index, network in enumerate(networks.guest)
            ]
        if spec.entropy:
            models.append(("entropy", EntropyDevice()))
        if spec.balloon:
            self.balloon = BalloonDevice(memory.discard)
            self.balloon.set_target(spec.balloon_target)
            models.append(("balloon", self.balloon))
        if spec.agent:
            self.agent = HostPort()
            models.append(("agent", ConsoleDevice(self.agent, spec.agent)))
        return models

    def _add(self, name: str, model: DeviceModel, place: DevicePlace, memory: HostAccessor, bus: MmioBus) -> None:
        device = self._resources.enter_context(VirtioDevice(model, memory, place.interrupt.pull, name=name))
        try:
            for queue, eventfd in enumerate(device.notified):
                place.connect(eventfd, place.window.start + QUEUE_NOTIFY, queue)
        except BackendError as error:
            raise HostError(f"this host's KVM cannot connect {name}: {error}") from error
        bus.add(place.window, MmioTransport(device))
        self.virtio.append(device)
