"""Wakes one thread, and lets go of the GIL in doing so.

A thread that is woken needs the GIL. ``queue.SimpleQueue``, ``threading.Lock`` and what is made of them hold it while
they wake somebody. Where both threads are on one CPU the kernel often goes over to the woken one at once, which then
can do nothing but go to sleep again: on the way from a vCPU's thread to the service and back that made six switches out
of two. An eventfd is written to without the GIL (``kvmd bench handoff``).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

from kvmd.closing import Closing
from kvmd.errors import BackendError


def new_eventfd(flags: int) -> int:
    """Return the descriptor of a new eventfd.

    Raises:
        BackendError: the process has no file descriptor left.
    """
    try:
        return os.eventfd(0, flags)
    except OSError as error:
        raise BackendError(f"no eventfd for a thread to wait on: {error.strerror}; raise LimitNOFILE=") from error


class Bell(Closing):
    """What one thread blocks on until another rings.

    A ring that comes while nobody waits ends the next wait at once; several are one. So whoever waits looks for what
    the ring was about, and waits again where there is nothing.

    Raises:
        BackendError: the process has no file descriptor left.

    Attributes:
        ring: wakes who waits. From any thread, before ``close``; never blocks.
        wait: blocks until rung. In one thread at a time.
    """

    __slots__ = ("_fd", "ring", "wait")

    def __init__(self) -> None:
        self._fd = new_eventfd(os.EFD_CLOEXEC)
        self.ring: Callable[[], object] = partial(os.eventfd_write, self._fd, 1)
        # Not os.eventfd_read, which a signal ends.
        self.wait: Callable[[], object] = partial(os.read, self._fd, 8)

    def close(self) -> None:
        """Give up the descriptor; harmless the second time."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
