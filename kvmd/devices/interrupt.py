"""An interrupt line as a device sees it: something to pull."""

from __future__ import annotations

import os

from kvmd.closing import Closing


class InterruptLine(Closing):
    """An edge-triggered interrupt line: an eventfd that the accelerator listens to.

    A device pulls it whenever a reason for an interrupt appears, from any thread; edges that come before the guest has
    looked may be one.
    """

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def fileno(self) -> int:
        """Return the eventfd, for the accelerator to connect.

        Raises:
            ValueError: it is closed.
        """
        if self._fd < 0:
            raise ValueError("an interrupt line is used after it was closed")
        return self._fd

    def pull(self) -> None:
        """Raise the interrupt; nothing where the line is closed. Never blocks."""
        if self._fd >= 0:
            # The accelerator takes the value off at once, so that it cannot overflow.
            os.eventfd_write(self._fd, 1)

    def close(self) -> None:
        """Give the line up; harmless the second time."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
