"""The bytes of one connection, both ways, and the descriptors that come with them."""

from __future__ import annotations

import array
import math
import os
import select
import socket
from collections.abc import Iterable

import trio

HALF_OPEN_LOOK_SECONDS = 1.0
"""How often a client that sends no more is looked at: epoll cannot wait for its complete end alone."""

_RECEIVE_BYTES = 65536
_FD_BYTES = array.array("i").itemsize
_ANCILLARY_BYTES = socket.CMSG_SPACE(2 * _FD_BYTES)
"""Room for one descriptor, and for one more, so that a surplus one shows. The kernel closes what does not fit."""


class Wire:
    """A connected stream socket.

    An end by error counts as an end: what a reset takes away, nobody waits for.

    Attributes:
        ended: whether the client has said that it sends no more (it may still read).
        passed: the descriptor that came with the bytes, not asked for yet; at most one.
    """

    def __init__(self, connection: trio.socket.SocketType) -> None:
        self._socket = connection
        self._stream = trio.SocketStream(connection)
        self._sending = False
        self.ended = False
        self.passed: list[int] = []

    async def receive(self) -> bytes:
        """Return the next bytes, or nothing at their end."""
        try:
            data, ancillary, _flags, _address = await self._socket.recvmsg(
                _RECEIVE_BYTES, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
            )
        except OSError:
            data, ancillary = b"", []
        for level, kind, value in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                self._keep_one(array.array("i", value[: len(value) - len(value) % _FD_BYTES]))
        self.ended = self.ended or not data
        return data

    async def send(self, data: bytes, seconds: float = math.inf) -> bool:
        """Send all of ``data``; return false where the client has gone, or did not take it within ``seconds``."""
        await trio.lowlevel.checkpoint()
        if self._sending:
            raise RuntimeError("two tasks send on one connection")
        try:
            # Most of what is sent fits into the socket's buffer, and needs no deadline then, which costs a tenth of a
            # small request.
            sent = os.write(self._socket.fileno(), data)
        except BlockingIOError:
            sent = 0
        except OSError:
            return False
        if sent == len(data):
            return True
        self._sending = True
        try:
            with trio.move_on_after(seconds):
                await self._stream.send_all(memoryview(data)[sent:])
                return True
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            self._sending = False
        return False

    async def wait_hung_up(self) -> None:
        """Return once a client that sends no more does not read either."""
        poll = select.poll()
        poll.register(self._socket.fileno(), 0)  # POLLHUP is told unasked (poll(2))
        while not any(  # noqa: ASYNC110 - nobody could set an event but the kernel, which only answers when asked
            events & (select.POLLHUP | select.POLLERR) for _, events in poll.poll(0)
        ):
            await trio.sleep(HALF_OPEN_LOOK_SECONDS)
        await trio.lowlevel.checkpoint()

    async def linger(self, seconds: float) -> None:
        """Say that no more is sent, and drop what still comes until the client has seen it, or for ``seconds``.

        Closing at once would fail a client that is still sending, and it might never read the answer (RFC 9112 9.6).
        """
        try:
            await self._stream.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return
        with trio.move_on_after(seconds):
            while await self.receive():
                self.drop_passed()

    def _keep_one(self, fds: Iterable[int]) -> None:
        """Keep a descriptor for the request under way and close the others: each byte may bring some more."""
        for fd in fds:
            if self.passed:
                os.close(fd)
            else:
                self.passed.append(fd)

    def drop_passed(self) -> None:
        """Close all descriptors that nobody asked for."""
        while self.passed:
            os.close(self.passed.pop())

    def close(self) -> None:
        """Close the socket and whatever came with its bytes."""
        self.drop_passed()
        self._socket.close()
