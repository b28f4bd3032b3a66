"""The virtio network device: clause 5.1 of virtio 1.2, on a tap or any descriptor that carries whole frames."""

from __future__ import annotations

import os
import struct
from typing import Protocol

import structlog
import trio

from kvmd.virtio.abi import DeviceId
from kvmd.virtio.activation import Activation
from kvmd.virtio.device_model import Host
from kvmd.virtio.live_queue import LiveQueue, Ring
from kvmd.virtio.memory import PART_BYTES, split, total_bytes, views
from kvmd.virtio.net_buffers import HEADER_BYTES, ReceiveBuffers
from kvmd.virtio.split_queue import Chain, QueueError

F_CSUM = 1 << 0
F_GUEST_CSUM = 1 << 1
F_MTU = 1 << 3
F_MAC = 1 << 5
F_GUEST_TSO4 = 1 << 7
F_GUEST_TSO6 = 1 << 8
F_GUEST_ECN = 1 << 9
F_HOST_TSO4 = 1 << 11
F_HOST_TSO6 = 1 << 12
F_HOST_ECN = 1 << 13
F_MRG_RXBUF = 1 << 15
F_STATUS = 1 << 16

_GUEST_OFFLOADS = F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6 | F_GUEST_ECN
_OFFLOADS = _GUEST_OFFLOADS | F_CSUM | F_HOST_TSO4 | F_HOST_TSO6 | F_HOST_ECN

_NEEDS = (
    (F_GUEST_TSO4 | F_GUEST_TSO6, F_GUEST_CSUM),
    (F_GUEST_ECN, F_GUEST_TSO4 | F_GUEST_TSO6),
    (F_HOST_TSO4 | F_HOST_TSO6, F_CSUM),
    (F_HOST_ECN, F_HOST_TSO4 | F_HOST_TSO6),
)
"""Each of the first wants one of the second (clause 5.1.3.1)."""

RECEIVE, TRANSMIT = 0, 1
"""Queues."""

QUEUE_SIZE = 256
ETHERNET_BYTES = 18
"""Addresses, type, and a VLAN tag."""
FRAME_LIMIT = HEADER_BYTES + 65550
"""The largest frame that segmentation offload makes, with its header (clause 5.1.6.3.1)."""

BATCH = 64
BATCH_BYTES = 1 << 18
"""Frames, and bytes of them, after which others have the event loop: about a millisecond."""

LINK_UP = 1
_CONFIG = struct.Struct("<6sHHH")
_ALWAYS_PAIRS = 1

_log = structlog.get_logger(__name__)


class FrameIo(Protocol):
    """Where frames go and come from: a tap, mostly."""

    @property
    def fd(self) -> int:
        """A non-blocking descriptor; each read or write of it is one frame."""

    def set_offloads(self, features: int, /) -> None:
        """Say which VIRTIO_NET_F_GUEST_* the guest has from now on (TUNSETOFFLOAD). May raise OSError."""

    def close(self) -> None:
        """Close it; harmless the second time."""


class NetworkDevice:
    """A network interface.

    Frames are moved by the event loop's thread, straight between the descriptor and guest memory: neither side ever
    waits in a system call. What a slow guest has no buffers for stays where it came from (a tap drops what it has no
    room for); while the host's side is full, what the guest sends stays in its queue.

    Args:
        io: the host's side, which belongs to the device from now on.
        mac: 6 bytes.
        mtu: what the guest is told, if anything.
        has_header: whether each frame has a struct virtio_net_hdr of 12 bytes before it (a tap's IFF_VNET_HDR, and
            TUNSETVNETHDRSZ of 12). Without it nothing is offloaded.

    Attributes:
        dropped: frames that could not be passed on, either way.
    """

    device_id = DeviceId.NETWORK
    queue_sizes = (QUEUE_SIZE, QUEUE_SIZE)

    def __init__(self, io: FrameIo, mac: bytes, mtu: int | None = None, *, has_header: bool = True) -> None:
        if len(mac) != 6 or mac[0] & 1:  # noqa: PLR2004 - a MAC address
            raise ValueError(f"{mac.hex(':')} is not the MAC address of one interface")
        self._io = io
        self._has_header = has_header
        self._mac = mac
        self._mtu = mtu
        self._link_up = True
        self._host: Host | None = None
        self._complained = False
        self._overflow = bytearray(FRAME_LIMIT)
        self.dropped = 0

    # -- the device ----------------------------------------------------------------------------------------------------

    @property
    def features(self) -> int:
        """What is offered."""
        common = F_MAC | F_STATUS | F_MRG_RXBUF | (F_MTU if self._mtu is not None else 0)
        return common | (_OFFLOADS if self._has_header else 0)

    @property
    def config(self) -> bytes:
        """The struct virtio_net_config, as far as it is there."""
        return _CONFIG.pack(self._mac, LINK_UP if self._link_up else 0, _ALWAYS_PAIRS, self._mtu or 0)

    def bind(self, host: Host) -> None:
        """Remember where changes of the link are told."""
        self._host = host

    def refusal(self, features: int) -> str | None:
        """Refuse an offload without the one that it stands on."""
        for wanting, needed in _NEEDS:
            if features & wanting and not features & needed:
                return f"network features {features & wanting:#x} need one of {needed:#x}"
        return None

    def config_written(self, offset: int, data: bytes) -> bytes | None:  # noqa: ARG002 - the protocol has them
        """Nothing of the configuration can be written since virtio 1.0."""
        return None

    @property
    def link_up(self) -> bool:
        """Whether the link is up."""
        return self._link_up

    def set_link(self, *, up: bool) -> None:
        """Plug the cable in or out. While it is out, frames are dropped, both ways."""
        if up != self._link_up:
            self._link_up = up
            if self._host is not None:
                self._host.set_config(self.config)

    async def run(self, active: Activation) -> None:
        """Move frames until cancelled."""
        transmit, receive = active.queue(TRANSMIT), active.queue(RECEIVE)
        features = active.features
        if self._has_header:
            self._set_offloads(features & _GUEST_OFFLOADS)
        large = bool(features & (F_GUEST_TSO4 | F_GUEST_TSO6))
        frame_limit = FRAME_LIMIT if large else HEADER_BYTES + ETHERNET_BYTES + max(self._mtu or 0, 1500)
        buffers = ReceiveBuffers(active.memory, frame_limit, mergeable=bool(features & F_MRG_RXBUF))
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._transmit, transmit, active)
                nursery.start_soon(self._receive, receive, buffers)
        finally:
            if self._has_header:
                self._set_offloads(0)

    def close(self) -> None:
        """Close the host's side."""
        self._io.close()

    def _set_offloads(self, features: int) -> None:
        try:
            self._io.set_offloads(features)
        except OSError as error:
            self._complain("its offloads cannot be set", error)

    def _complain(self, what: str, error: OSError) -> None:
        if not self._complained:
            self._complained = True
            _log.warning("network interface", mac=self._mac.hex(":"), problem=what, error=error.strerror)

    # -- from the guest ------------------------------------------------------------------------------------------------

    async def _transmit(self, queue: LiveQueue, active: Activation) -> None:
        io = self._io
        while True:
            size_bytes = 0
            more, full = True, False
            with queue as ring:
                ring.disarm()
                for _ in range(BATCH):
                    chain = ring.pop()
                    if chain is None:
                        more = ring.arm()
                        break
                    frame_bytes = total_bytes(chain.readable)
                    if frame_bytes < HEADER_BYTES:
                        raise QueueError(f"a frame of {frame_bytes} bytes, without a whole header")
                    if not self._send(active, chain, frame_bytes):
                        ring.unpop()
                        full = True
                        break
                    ring.push(chain, 0)
                    size_bytes += frame_bytes + PART_BYTES * len(chain.readable)
                    if size_bytes >= BATCH_BYTES:
                        break
            if full:
                await trio.lowlevel.wait_writable(io.fd)
            elif more:
                await trio.lowlevel.checkpoint()
            else:
                await queue.wait()

    def _send(self, active: Activation, chain: Chain, frame_bytes: int) -> bool:
        """Send or drop a frame; false where it has to wait."""
        if frame_bytes > FRAME_LIMIT or not self._link_up:
            self.dropped += 1
            return True
        parts = chain.readable if self._has_header else split(chain.readable, HEADER_BYTES)[1]
        try:
            os.writev(self._io.fd, views(active.memory, parts))
        except BlockingIOError:
            return False
        except OSError as error:
            # A header that makes no sense (EINVAL), an interface that is down (EIO): the frame is lost, like on a wire.
            self.dropped += 1
            self._complain("frames from the guest are dropped", error)
        return True

    # -- to the guest --------------------------------------------------------------------------------------------------

    async def _receive(self, queue: LiveQueue, buffers: ReceiveBuffers) -> None:
        while True:
            with queue as ring:
                ring.disarm()
                more, starved = self._receive_some(ring, buffers)
            if starved:
                await queue.wait()
            elif more is None:
                await trio.sleep_forever()
            elif more:
                await trio.lowlevel.checkpoint()
            else:
                await trio.lowlevel.wait_readable(self._io.fd)

    def _receive_some(self, ring: Ring, buffers: ReceiveBuffers) -> tuple[bool | None, bool]:
        """Give frames to the guest.

        Returns:
            Whether there may be more frames now (None: never again), and whether they wait for buffers.
        """
        if ring.paused:
            # Buffers that were taken before are there, and must not be filled.
            return True, True
        size_bytes = 0
        buffers.refresh()
        for _ in range(BATCH):
            if self._link_up and not buffers.fill(ring):
                # Asked under the queue's lock: what came since is seen at once.
                return True, not ring.arm()
            try:
                frame_bytes = self._read_frame(buffers)
            except BlockingIOError:
                return False, False
            except OSError as error:
                self._complain("it cannot be read any more", error)
                frame_bytes = 0
            if frame_bytes == 0:
                self.set_link(up=False)
                return None, False
            if not self._link_up or not buffers.deliver(ring, frame_bytes):
                self.dropped += 1
            size_bytes += frame_bytes
            if size_bytes >= BATCH_BYTES:
                break
        return True, False

    def _read_frame(self, buffers: ReceiveBuffers) -> int:
        """Read a frame into the guest's buffers, and return its bytes with the header; 0 when there will be no more."""
        if not self._link_up:
            return os.readv(self._io.fd, [self._overflow])
        # What does not fit any buffer goes behind them, where it shows that the frame was too long.
        if self._has_header:
            return os.readv(self._io.fd, [*buffers.views, self._overflow])
        frame_bytes = os.readv(self._io.fd, [*buffers.views_after_header(), self._overflow])
        return frame_bytes and HEADER_BYTES + frame_bytes
