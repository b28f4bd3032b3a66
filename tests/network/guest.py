"""A guest's side of a tap, for tests: answers ARP, reads and writes frames."""

from __future__ import annotations

import ipaddress
import os
import select
import socket
import struct
import subprocess
from dataclasses import dataclass

from kvmd.network.networks import GuestNetwork
from kvmd.network.tap import VNET_HEADER_BYTES

ETHERNET = struct.Struct(">6s6sH")
BROADCAST = b"\xff" * 6
ARP, IPV4, TEST = 0x0806, 0x0800, 0x88B5  # the last: IEEE 802, local experimental

SECONDS = 60.0
"""How long a frame may take; none takes a millisecond on a machine that is not busy."""


def ip(*arguments: str) -> str:
    """Call the program, and return what it prints."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True)  # noqa: S603, S607 - it is ip
    return done.stdout


@dataclass(frozen=True)
class Frame:
    header: bytes
    target: bytes
    source: bytes
    kind: int
    payload: bytes


class Guest:
    """The guest of a network, with an address of its own.

    Args:
        network: as ``open_networks`` made it.
        address: IPv4.

    Attributes:
        kinds: of all frames that were read.
    """

    def __init__(self, network: GuestNetwork, address: str = "10.9.0.2") -> None:
        self.fd = network.tap.fd
        self.mac = network.mac
        self.address = ipaddress.ip_address(address).packed
        self.kinds: list[int] = []

    def read(self, *wanted: int) -> Frame:
        """Return the next frame of these kinds; the host also sends some of its own."""
        while True:
            readable, _, _ = select.select([self.fd], [], [], SECONDS)
            assert readable, "no frame came"
            data = os.read(self.fd, 1 << 17)
            header, frame = data[:VNET_HEADER_BYTES], data[VNET_HEADER_BYTES:]
            target, source, kind = ETHERNET.unpack_from(frame)
            self.kinds.append(kind)
            if kind in wanted:
                return Frame(header, target, source, kind, frame[ETHERNET.size :])

    def write(self, target: bytes, kind: int, payload: bytes, *, header: bytes = bytes(VNET_HEADER_BYTES)) -> None:
        frame = header + ETHERNET.pack(target, self.mac, kind) + payload
        assert os.write(self.fd, frame) == len(frame)

    def read_udp(self) -> Frame:
        """Return the next frame with a UDP datagram over IPv4; questions for this address are answered."""
        while True:
            frame = self.read(ARP, IPV4)
            if frame.kind == IPV4 and frame.payload[9] == socket.IPPROTO_UDP:  # the host also sends IGMP
                return frame
            if frame.kind == ARP and frame.payload[24:28] == self.address:
                reply = frame.payload[:6] + b"\0\2" + self.mac + self.address + frame.payload[8:18]
                self.write(frame.source, ARP, reply)

    def answer_udp(self) -> bytes:
        """Send the next datagram back to where it came from, and return what was in it."""
        frame = self.read_udp()
        packet = frame.payload
        source, target = packet[12:16], packet[16:20]
        sport, dport, length = struct.unpack_from(">HHH", packet, 20)
        # UDP's checksum may be left out over IPv4; the header's own is the same with both addresses swapped.
        udp = struct.pack(">HHHH", dport, sport, length, 0) + packet[28 : 20 + length]
        self.write(frame.source, IPV4, packet[:12] + target + source + udp)
        return packet[28 : 20 + length]
