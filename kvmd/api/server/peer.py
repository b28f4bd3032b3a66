"""Who is at the other end of a connection, as the kernel says."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from typing import Protocol

_SO_PEERGROUPS = 59
"""include/uapi/asm-generic/socket.h (Linux 4.13); Python has no name for it."""

_UCRED = struct.Struct("iII")
_GROUPS_LIMIT = 65536
"""NGROUPS_MAX (include/uapi/linux/limits.h)."""

_USUAL_GROUPS = 64


class HasOptions(Protocol):
    """What is asked: a socket of the standard library, or of trio."""

    def getsockopt(self, level: int, optname: int, buflen: int, /) -> bytes:
        """Return an option's value."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A process, with the credentials that it had when it connected: it cannot change them any more.

    Attributes:
        pid: 0 where it is in a PID namespace that this process cannot see.
        uid: its effective user.
        groups: its effective group and its supplementary ones.
    """

    pid: int
    uid: int
    groups: frozenset[int]


def peer_of(connection: HasOptions) -> Peer:
    """Return who connected (unix(7), SO_PEERCRED and SO_PEERGROUPS).

    Raises:
        OSError: the socket is not a connected Unix socket.
    """
    pid, uid, gid = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return Peer(pid, uid, frozenset({gid, *_supplementary(connection)}))


def _supplementary(connection: HasOptions) -> tuple[int, ...]:
    for count in (_USUAL_GROUPS, _GROUPS_LIMIT):
        try:
            data = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 4 * count)
        except OSError:
            if count == _GROUPS_LIMIT:
                raise
            continue  # ERANGE: there are more of them
        return struct.unpack(f"{len(data) // 4}I", data)
    raise AssertionError  # the last turn returns or raises
