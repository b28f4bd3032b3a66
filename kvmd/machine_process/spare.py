"""A process that was forked before anybody asked for a machine, and waits to be told which one it is.

A fork copies page tables, and the child then every page that it writes to, which in Python is every page with an object
that it looks at. Here both are done by the time that somebody waits for the machine.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import NoReturn

from kvmd.machine_process.process import Inheritance
from kvmd.machine_process.spawning import DESCRIPTORS_LIMIT

_GO = b"be"


def open_child(pid: int) -> int:
    """Return a descriptor of a child that was forked just now; where there is none, nothing is left of the child.

    Raises:
        OSError: the process has no file descriptor left.
    """
    try:
        return os.pidfd_open(pid)
    except OSError:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise


class Spare:
    """A child of this process that waits; made by a process with one thread, which reaps it.

    Args:
        be: what the child does; it never returns. It is given what waits for the child's inheritance: that returns None
            where no machine is wanted any more.
        rehearse: what it does before it waits.

    Raises:
        OSError: there is no process, or no descriptor, left for it.

    Attributes:
        pid: its process.
        pidfd: readable when it has ended; belongs to the caller after ``become``.
    """

    def __init__(
        self, be: Callable[[Callable[[], Inheritance | None]], NoReturn], rehearse: Callable[[], None]
    ) -> None:
        self._link, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with its:
                self.pid = os.fork()
                if self.pid == 0:
                    self._link.close()
                    be(partial(_wait, its, rehearse))
            self.pidfd = open_child(self.pid)
        except OSError:
            self._link.close()
            raise

    def become(self, inherited: Inheritance) -> bool:
        """Let it be that machine; false where it has been killed, and is to be dismissed."""
        birth = () if inherited.birth is None else (inherited.birth,)
        try:
            socket.send_fds(self._link, [_GO], [inherited.folder, inherited.listening, *birth, *inherited.files])
        except OSError:
            return False
        self._link.close()
        return True

    def forget(self) -> None:
        """Close what the parent has of it: in another child."""
        self._link.close()
        os.close(self.pidfd)

    def dismiss(self) -> None:
        """End it, and reap it."""
        self._link.close()
        # It would end by itself, but not while somebody has stopped it.
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.pidfd)


def _wait(link: socket.socket, rehearse: Callable[[], None]) -> Inheritance | None:
    """Wait in the child; None where the parent has gone, or wants no machine."""
    rehearse()
    with link, suppress(OSError):
        data, fds, _, _ = socket.recv_fds(link, len(_GO), DESCRIPTORS_LIMIT)
        if data:
            return Inheritance.received(fds)
    return None
