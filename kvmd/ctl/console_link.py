"""A console both ways: what is typed goes to the guest, what it prints comes back, until one of the two ends."""

from __future__ import annotations

import enum
import os
import select
import socket
from collections.abc import Callable
from contextlib import suppress

_PIECE = 65536
_AHEAD_LIMIT = 65536
"""Bytes that are typed ahead of a guest that does not read."""

_BELL = b"\a"


class Ended(enum.Enum):
    """Why a link ended."""

    DETACHED = "detached"
    """The detach key was typed, or the terminal went away."""
    QUIET = "quiet"
    """All was typed, and nothing came any more."""
    OTHER_SIDE = "other-side"
    """The daemon closed it: the machine has ended, or kvmd stops."""


class ConsoleLink:
    """Carries bytes between a connection and descriptors.

    Args:
        connection: to the console; not blocking.
        keyboard: read from; at its end the guest gets no more input, and what it prints is still shown.
        is_terminal: whether a person types: then the detach key is looked for, and what a guest that does not read is
            typed beyond a bound is dropped with a bell. Otherwise no more is read meanwhile.
        show: shows what the guest prints.
        detach: the byte of the detach key.
        quiet_seconds: after all was typed, how long nothing may come; None for ever.
    """

    def __init__(
        self,
        connection: socket.socket,
        keyboard: int,
        *,
        is_terminal: bool,
        show: Callable[[bytes], None],
        detach: bytes = b"",
        quiet_seconds: float | None = None,
    ) -> None:
        self._connection = connection
        self._keyboard: int | None = keyboard
        self._is_terminal = is_terminal
        self._show = show
        self._detach = detach
        self._quiet_seconds = quiet_seconds
        self._ahead = bytearray()

    def run(self) -> Ended:
        """Carry bytes until one side ends.

        Raises:
            BrokenPipeError: nobody reads what the guest prints.
        """
        while True:
            poll = select.poll()
            writing = select.POLLOUT if self._ahead else 0
            poll.register(self._connection, select.POLLIN | writing)
            if self._keyboard is not None and (self._is_terminal or len(self._ahead) < _AHEAD_LIMIT):
                poll.register(self._keyboard, select.POLLIN)
            over = self._quiet_seconds is not None and self._keyboard is None and not self._ahead
            ready = dict(poll.poll(self._quiet_seconds * 1000 if over and self._quiet_seconds is not None else None))
            if not ready:
                return Ended.QUIET
            if self._keyboard in ready and not self._type():
                return Ended.DETACHED
            if ready.get(self._connection.fileno(), 0) & ~select.POLLOUT and not self._print():
                return Ended.OTHER_SIDE
            self._send()

    def _type(self) -> bool:
        """Take what was typed; return False where that is the end of it all."""
        assert self._keyboard is not None  # noqa: S101 - it was polled
        try:
            data = os.read(self._keyboard, _PIECE)
        except BlockingIOError:
            return True
        except OSError:
            data = b""  # EIO: the terminal has hung up
        if self._is_terminal:
            before, key, _ = data.partition(self._detach)
            self._take(before)
            return bool(data) and not key
        if not data:
            self._keyboard = None
            self._send()
            self._end_of_input()
            return True
        self._ahead += data
        return True

    def _take(self, data: bytes) -> None:
        room = _AHEAD_LIMIT - len(self._ahead)
        self._ahead += data[:room]
        if len(data) > room:
            self._show(_BELL)

    def _send(self) -> None:
        if not self._ahead:
            return
        try:
            sent = self._connection.send(self._ahead)
        except BlockingIOError:
            return
        except ConnectionError:
            # The other side's end is seen where it is read: what it printed last comes before.
            self._ahead.clear()
            return
        del self._ahead[:sent]
        self._end_of_input()

    def _end_of_input(self) -> None:
        """Say that no more is typed, once all that was has gone."""
        if self._keyboard is None and not self._ahead:
            with suppress(OSError):
                self._connection.shutdown(socket.SHUT_WR)

    def _print(self) -> bool:
        """Show what was printed; return False at the end."""
        try:
            data = self._connection.recv(_PIECE)
        except BlockingIOError:
            return True
        except ConnectionError:
            return False
        if data:
            self._show(data)
        return bool(data)
