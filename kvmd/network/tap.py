"""Taps: Ethernet interfaces of the host whose other end is a file (linux/if_tun.h, Documentation/networking/tuntap).

No tap of kvmd's is persistent: the kernel removes it with the last descriptor, however the process ends.
"""

from __future__ import annotations

import errno
import os
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fcntl import ioctl
from pathlib import Path

from kvmd.closing import Closing
from kvmd.errors import HostError
from kvmd.network.naming import LOCK

DEVICE = Path("/dev/net/tun")

VNET_HEADER_BYTES = 12
"""Of the struct virtio_net_hdr before each frame, num_buffers included (virtio 1.2, 5.1.6)."""

# linux/if_tun.h
_TUNSETIFF = 0x400454CA
_TUNSETOFFLOAD = 0x400454D0
_TUNSETVNETHDRSZ = 0x400454D8
_TUNSETVNETLE = 0x400454DC
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR, _IFF_TUN_EXCL = 0x2, 0x1000, 0x4000, 0x8000
_IFREQ = struct.Struct("16sH22x")

# Bits of VIRTIO_NET_F_GUEST_* (virtio 1.2, 5.1.3), and what TUNSETOFFLOAD calls them.
_GUEST_CSUM, _GUEST_TSO4, _GUEST_TSO6, _GUEST_ECN, _GUEST_USO4, _GUEST_USO6 = (1 << bit for bit in (1, 7, 8, 9, 54, 55))
_TUN_F = {
    _GUEST_CSUM: 0x01,
    _GUEST_TSO4: 0x02,
    _GUEST_TSO6: 0x04,
    _GUEST_ECN: 0x08,
    _GUEST_USO4: 0x20,
    _GUEST_USO6: 0x40,
}
_TSO = _GUEST_TSO4 | _GUEST_TSO6
_USO = _GUEST_USO4 | _GUEST_USO6

GUEST_OFFLOADS = _GUEST_CSUM | _TSO | _GUEST_ECN | _USO
"""Feature bits of virtio-net that say what a guest takes unfinished, of those that a tap knows (UFO is gone)."""

_LOCK_SECONDS = 10.0
_LOCK_POLL_SECONDS = 0.005


class TapInUse(HostError):
    """There is an interface of that name already."""


class Tap(Closing):
    """An open tap. Each frame that is read or written has a struct virtio_net_hdr of 12 bytes before it.

    Attributes:
        name: the interface's.
        fd: not blocking, close-on-exec; closed by ``close``.
    """

    __slots__ = ("fd", "name")

    def __init__(self, name: str, fd: int) -> None:
        self.name = name
        self.fd = fd

    @classmethod
    def make(cls, name: str) -> Tap:
        """Make the interface, in the network namespace of the calling thread; it is down.

        Raises:
            TapInUse: there is an interface of that name.
            HostError: taps cannot be made here; the message says what is missing.
        """
        fd = _open_device()
        try:
            _set_interface(fd, name)
            ioctl(fd, _TUNSETVNETHDRSZ, struct.pack("i", VNET_HEADER_BYTES))
            # Virtio 1.x is little-endian on any host.
            ioctl(fd, _TUNSETVNETLE, struct.pack("i", 1))
        except OSError as error:
            os.close(fd)
            raise HostError(f"cannot set up tap {name}: {error.strerror}") from error
        except BaseException:
            os.close(fd)
            raise
        return cls(name, fd)

    @classmethod
    def make_first(cls, names: Sequence[str]) -> Tap:
        """Make a tap of the first of the names that is free.

        Raises:
            HostError: as ``make``, of the last name.
        """
        for name in names[:-1]:
            try:
                return cls.make(name)
            except TapInUse:
                continue
        return cls.make(names[-1])

    def set_offloads(self, features: int) -> None:
        """Let the kernel hand over frames that the guest finishes itself: without checksum, larger than the MTU.

        To be called when the guest has negotiated features, and with 0 when its device is reset.

        Args:
            features: of virtio-net, as negotiated; of them VIRTIO_NET_F_GUEST_{CSUM,TSO4,TSO6,ECN,USO4,USO6} count.

        Raises:
            OSError: the kernel knows one of them not; ``offered_offloads`` says which it knows.
        """
        ioctl(self.fd, _TUNSETOFFLOAD, tun_offloads(features))

    def offered_offloads(self) -> int:
        """Return the VIRTIO_NET_F_GUEST_* bits that this tap can honour; none is in force afterwards."""
        for features in (GUEST_OFFLOADS, GUEST_OFFLOADS & ~_USO):  # USO since Linux 6.2
            try:
                self.set_offloads(features)
            except OSError:
                continue
            self.set_offloads(0)
            return features
        return 0

    def close(self) -> None:
        """Remove the interface; harmless the second time."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def tun_offloads(features: int) -> int:
    """Return what TUNSETOFFLOAD takes (TUN_F_*) for negotiated features of virtio-net.

    Segments need checksums, ECN needs segments, and the kernel knows USO for both versions of IP only (set_offload in
    drivers/net/tun.c): what a guest negotiated without its foundation is left out, not refused.
    """
    if not features & _GUEST_CSUM:
        return 0
    if not features & _TSO:
        features &= ~_GUEST_ECN
    if features & _USO != _USO:
        features &= ~_USO
    return sum(flag for bit, flag in _TUN_F.items() if features & bit)


@contextmanager
def changing() -> Iterator[None]:
    """Hold the lock of what machines share in this network namespace: bridges that kvmd makes, names of namespaces.

    It is a tap of a fixed name: only who has CAP_NET_ADMIN can take it, it needs no folder that all users of kvmd can
    write to, it belongs to the network namespace as what it protects does, and it is gone with its holder.

    Raises:
        HostError: taps cannot be made here, or somebody holds it for 10 s.
    """
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            lock = Tap.make(LOCK)
            break
        except TapInUse as error:
            if time.monotonic() > deadline:
                raise HostError(
                    f"another process has held {LOCK}, the lock of kvmd's networks, for {_LOCK_SECONDS:.0f} s: "
                    f"see who has {DEVICE} open"
                ) from error
            time.sleep(_LOCK_POLL_SECONDS)
    with lock:
        yield


def _open_device() -> int:
    try:
        return os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in {errno.ENOENT, errno.ENODEV, errno.ENXIO}:
            raise HostError(f"{DEVICE} is missing: load the module tun (modprobe tun)") from error
        raise HostError(
            f"cannot open {DEVICE}: {error.strerror}: this user, or this unit's DeviceAllow=, does not allow it"
        ) from error


def _set_interface(fd: int, name: str) -> None:
    flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | _IFF_TUN_EXCL
    try:
        ioctl(fd, _TUNSETIFF, _IFREQ.pack(name.encode("ascii"), flags))
    except OSError as error:
        if error.errno in {errno.EBUSY, errno.EEXIST}:
            raise TapInUse(f"there is an interface {name} already: take another name for the tap") from error
        if error.errno == errno.EPERM:
            raise HostError(
                f"no CAP_NET_ADMIN, which making tap {name} needs: docs/network.md says how to give it"
            ) from error
        raise
