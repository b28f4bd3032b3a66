"""The host's side of a network device, without a network: one end of a pair of sockets."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field

MAC = bytes.fromhex("02aabbccddee")


@dataclass
class Wire:
    """A socket pair that keeps frames apart: ``fd`` is the device's end, ``far`` is the test's.

    Attributes:
        offloads: what was asked for.
        refuses: whether it is refused.
    """

    near: socket.socket
    far: socket.socket
    offloads: list[int] = field(default_factory=list)
    refuses: bool = False

    @property
    def fd(self) -> int:
        return self.near.fileno()

    def set_offloads(self, features: int) -> None:
        if self.refuses:
            raise OSError(22, "Invalid argument")
        self.offloads.append(features)

    def close(self) -> None:
        self.near.close()


def wire() -> Wire:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (near, far):
        end.settimeout(0)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    return Wire(near, far)
