"""A connection to the daemon's Unix socket, as ``http.client`` wants one.

Every read waits in one place, so that it can end early: at a deadline, or when whoever reads kvmctl's output has gone.
"""

from __future__ import annotations

import grp
import io
import os
import pwd
import select
import socket
import stat
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from kvmd.ctl.errors import CutOff, Unreachable
from kvmd.ctl.text import shown

if TYPE_CHECKING:
    # ReadableBuffer has no name at run time.
    from _typeshed import ReadableBuffer, WriteableBuffer

SOCKET_PATH = "/run/kvmd/kvmd.sock"
VIEWERS_SOCKET_PATH = "/run/kvmd/view.sock"
"""Where those connect who may only look, in a group of their own; tried where the other may not be opened."""

_CONNECT_SECONDS = 10.0


class Wire:
    """One connected socket.

    Args:
        connected: taken over.
        seconds: how long the whole answer may take, or None.
        silence_seconds: how long nothing may come, or None. A stream says something every 15 seconds.
        output: a descriptor whose reader may go away; then a read ends with BrokenPipeError. A pipe to ``head`` would
            otherwise be noticed at the next event, which may be tomorrow.
        read_ahead: whether more may be read than was asked for; not where the connection becomes something else.
    """

    def __init__(
        self,
        connected: socket.socket,
        *,
        seconds: float | None = None,
        silence_seconds: float | None = None,
        output: int | None = None,
        read_ahead: bool = True,
    ) -> None:
        self.socket = connected
        self._silence_seconds = silence_seconds
        self._output = output
        self._read_ahead = read_ahead
        self._files: Sequence[int] = ()
        self.set_deadline(seconds)

    def set_deadline(self, seconds: float | None) -> None:
        """Let everything from now on take that long at most."""
        self._deadline = None if seconds is None else time.monotonic() + seconds

    def pass_files(self, files: Sequence[int]) -> None:
        """Let these descriptors go with the next bytes (unix(7), SCM_RIGHTS)."""
        self._files = files

    # -- what http.client uses of a socket

    def sendall(self, data: ReadableBuffer) -> None:
        """Send all of it.

        Raises:
            CutOff: the other side does not take it.
        """
        view = memoryview(data).cast("B")
        while view:
            self._wait(select.POLLOUT)
            with suppress(BlockingIOError):
                if self._files:
                    sent = socket.send_fds(self.socket, [view], list(self._files))
                    self._files = ()
                else:
                    sent = self.socket.send(view)
                view = view[sent:]

    def makefile(self, mode: str) -> io.BufferedReader:
        """Return what the other side sends as a file."""
        assert mode == "rb"  # noqa: S101 - what http.client asks for
        return io.BufferedReader(_Incoming(self), io.DEFAULT_BUFFER_SIZE if self._read_ahead else 1)

    def close(self) -> None:
        """Do nothing: http.client closes a socket whose answer says that it is the last before that was read."""

    def hang_up(self) -> None:
        """Close the connection."""
        self.socket.close()

    # -- waiting

    def receive_into(self, buffer: WriteableBuffer) -> int:
        """Wait for bytes; return how many there were, 0 at the end.

        Raises:
            CutOff: nothing came in time.
            BrokenPipeError: nobody reads the output any more.
        """
        while True:
            self._wait(select.POLLIN)
            with suppress(BlockingIOError):
                return self.socket.recv_into(buffer)

    def _wait(self, events: int) -> None:
        poll = select.poll()
        poll.register(self.socket, events)
        if self._output is not None:
            poll.register(self._output, 0)  # POLLERR and POLLHUP are told unasked (poll(2))
        if not self._polled(poll, self._milliseconds()):
            raise CutOff("kvmd does not answer: the connection was silent for too long")

    def _polled(self, poll: select.poll, milliseconds: float | None) -> bool:
        """Return whether the socket is ready, and not the time over."""
        found = dict(poll.poll(milliseconds))
        if self._output is not None and found.get(self._output, 0) & (select.POLLERR | select.POLLHUP):
            raise BrokenPipeError
        return bool(found)

    def _milliseconds(self) -> float | None:
        limits = [] if self._silence_seconds is None else [self._silence_seconds]
        if self._deadline is not None:
            limits.append(max(0.0, self._deadline - time.monotonic()))
        return min(limits) * 1000 if limits else None


class _Incoming(io.RawIOBase):
    """The reading side of a wire."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        return self._wire.receive_into(buffer)


def connect(path: str | None) -> socket.socket:
    """Return a socket connected to the daemon's.

    Args:
        path: where it listens; None for where it does by default.

    Raises:
        Unreachable: it cannot be, with what to do about it.
    """
    if path is not None:
        return _connect(path)
    try:
        return _connect(SOCKET_PATH)
    except Unreachable:
        # Who may only look has a door of their own.
        if os.access(SOCKET_PATH, os.W_OK) or not os.access(VIEWERS_SOCKET_PATH, os.W_OK):
            raise
        return _connect(VIEWERS_SOCKET_PATH)


def _connect(path: str) -> socket.socket:
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        # Of a full backlog: connecting waits as long as a timeout lets it (unix(7)).
        connected.settimeout(_CONNECT_SECONDS)
        connected.connect(os.fsencode(path))
        connected.setblocking(False)  # noqa: FBT003 - the standard library's
    except OSError as error:
        connected.close()
        raise Unreachable(_why_not(path, error)) from error
    except BaseException:
        connected.close()
        raise
    return connected


def _why_not(path: str, error: OSError) -> str:
    name = shown(path)
    match error:
        case FileNotFoundError():
            return (
                f"kvmd is not running: there is no socket {name} "
                "(systemctl start kvmd.socket; or name another socket with --socket or KVMD_SOCKET)"
            )
        case ConnectionRefusedError() if not _is_socket(path):
            return f"{name} is no socket: name kvmd's with --socket or KVMD_SOCKET"
        case ConnectionRefusedError():
            return f"kvmd is not running: nobody listens on {name} (systemctl status kvmd says why)"
        case PermissionError():
            return f"you may not open kvmd's socket {name}{_group_hint(path)}"
        case TimeoutError() | BlockingIOError():
            return f"kvmd does not answer: too many clients wait at {name}"
        case _:
            return f"cannot connect to {name}: {error.strerror or error}"


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)  # noqa: PTH116 - pathlib takes 5 ms to import
    except OSError:
        return False


def _group_hint(path: str) -> str:
    """Return whom the socket is open to, and how to become one of them."""
    try:
        found = os.stat(path)  # noqa: PTH116 - pathlib takes 5 ms to import
        group = grp.getgrgid(found.st_gid)
        user = pwd.getpwuid(os.geteuid()).pw_name
    except (OSError, KeyError):
        return ""
    if not found.st_mode & stat.S_IWGRP:
        return ""
    if user in group.gr_mem and found.st_gid not in os.getgroups():
        return f": you are in its group {group.gr_name}, but not since your last log-in: log in again"
    return f": it is open to the group {group.gr_name} (usermod -aG {group.gr_name} {user}, then log in again)"
