"""Run in a network namespace of its own: frames between a driver and the kernel, through a real tap."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
from dataclasses import dataclass
from fcntl import ioctl

import trio

from kvmd.virtio.net import F_CSUM, F_GUEST_CSUM, F_MAC, F_MRG_RXBUF, NetworkDevice
from tests.virtio.driver import WATCHDOG_SECONDS, Driver, Memory, driven, guest_memory
from tests.virtio.wire import MAC

TAP = "kvmdtest0"
HOST, GUEST = socket.inet_aton("10.99.0.1"), socket.inet_aton("10.99.0.2")


@dataclass
class Tap:
    fd: int

    def set_offloads(self, features: int) -> None:
        ioctl(self.fd, 0x400454D0, int(bool(features & F_GUEST_CSUM)))  # TUNSETOFFLOAD, TUN_F_CSUM

    def close(self) -> None:
        os.close(self.fd)


def open_tap() -> Tap:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    ioctl(fd, 0x400454CA, struct.pack("16sH22x", TAP.encode(), 0x5002))  # TUNSETIFF: TAP, NO_PI, VNET_HDR
    ioctl(fd, 0x400454D8, struct.pack("i", 12))  # TUNSETVNETHDRSZ
    for command in (f"addr add 10.99.0.1/24 dev {TAP}", f"link set {TAP} up"):
        subprocess.run(["ip", *command.split()], check=True)  # noqa: S603, S607 - written here
    return Tap(fd)


class Ends:
    """The driver's two queues."""

    def __init__(self, driver: Driver, memory: Memory) -> None:
        self.driver = driver
        self.memory = memory
        self.buffers: dict[int, int] = {}
        for _ in range(64):
            gpa = memory.allocate(2048)
            self.buffers[driver.queues[0].offer((), [(gpa, 2048)])] = gpa
        driver.queues[0].kick()

    async def frame(self, wanted: bytes) -> bytes:
        """Wait for a frame with these bytes in it, and return it with its header."""
        with trio.fail_after(WATCHDOG_SECONDS):
            while True:
                for head, written in await self.driver.queues[0].completed():
                    frame = self.memory.read(self.buffers[head], written)
                    if wanted in frame:
                        return frame

    async def send(self, header: bytes, frame: bytes) -> None:
        gpa = self.memory.allocate(len(header + frame))
        self.memory.write(gpa, header + frame)
        self.driver.queues[1].offer([(gpa, len(header + frame))])
        self.driver.queues[1].kick()
        await self.driver.queues[1].completed()


def sum16(data: bytes) -> int:
    total = int(sum(struct.unpack(f">{len(data) // 2}H", data)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


async def main() -> None:
    with guest_memory() as memory:
        async with driven(NetworkDevice(open_tap(), MAC), memory) as driver:
            driver.start(F_MAC | F_CSUM | F_GUEST_CSUM | F_MRG_RXBUF)
            ends = Ends(driver, memory)
            arp = struct.pack(">HHBBH6s4s6s4s", 1, 0x0800, 6, 4, 1, MAC, GUEST, bytes(6), HOST)
            await ends.send(bytes(12), b"\xff" * 6 + MAC + b"\x08\x06" + arp)
            answer = await ends.frame(b"\x08\x06" + struct.pack(">HHBBH", 1, 0x0800, 6, 4, 2))
            host_mac = answer[12 + 6 : 12 + 12]
            print("arp")  # noqa: T201 - the test reads it

            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as host:
                host.bind(("10.99.0.1", 9))
                host.settimeout(WATCHDOG_SECONDS)
                payload = b"from the guest, its checksum left to the host!"
                length = 8 + len(payload)
                partial = sum16(GUEST + HOST + struct.pack(">HH", 17, length))
                udp = struct.pack(">HHHH", 7, 9, length, partial) + payload
                ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + length, 0, 0, 64, 17, 0, GUEST, HOST)
                ip = ip[:10] + struct.pack(">H", sum16(ip) ^ 0xFFFF) + ip[12:]
                # NEEDS_CSUM, from byte 34 on, into byte 6 of that (clause 5.1.6.2).
                await ends.send(struct.pack("<BBHHHHH", 1, 0, 0, 0, 34, 6, 0), host_mac + MAC + b"\x08\0" + ip + udp)
                assert await trio.to_thread.run_sync(host.recv, 4096) == payload
                print("udp-to-host")  # noqa: T201 - as above

                host.sendto(b"from the host, its checksum left to the guest", ("10.99.0.2", 7))
                frame = await ends.frame(b"its checksum left to the guest")
                assert frame[0] == 1, "NEEDS_CSUM"
                assert frame[10:12] == b"\1\0", "one buffer"
                print("udp-to-guest")  # noqa: T201 - as above


if __name__ == "__main__":
    trio.run(main)
