"""Who is at the other end of a connection, as the kernel says."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from dataclasses import dataclass
from typing import Protocol

_SO_PEERGROUPS = 59
"""include/uapi/asm-generic/socket.h (Linux 4.13); Python has no name for it."""

_UCRED = struct.Struct("iII")
_GROUPS_LIMIT = 65536
"""NGROUPS_MAX (include/uapi/linux/limits.h)."""

_PYTHON_LIMIT = 1024
"""Bytes that Python's getsockopt returns at most: 256 groups, which few users have."""

_libc = ctypes.CDLL(None, use_errno=True)


class HasOptions(Protocol):
    """What is asked: a socket of the standard library, or of trio."""

    def getsockopt(self, level: int, optname: int, buflen: int, /) -> bytes:
        """Return an option's value."""

    def fileno(self) -> int:
        """Return the descriptor."""


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
    try:
        data = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _PYTHON_LIMIT)
    except OSError as error:
        if error.errno != errno.ERANGE:
            raise
        data = _many_groups(connection.fileno())
    return struct.unpack(f"{len(data) // 4}I", data)


def _many_groups(fd: int) -> bytes:
    buffer = ctypes.create_string_buffer(4 * _GROUPS_LIMIT)
    length = ctypes.c_uint32(len(buffer))
    if _libc.getsockopt(fd, socket.SOL_SOCKET, _SO_PEERGROUPS, buffer, ctypes.byref(length)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return buffer.raw[: length.value]
