"""What kvmctl exits with.

The numbers are ``kvmd run``'s (``kvmd.stop.ExitStatus``): a script that starts guests with one or the other reads the
same ones. They are written down again here since that module needs 20 ms to import; a test keeps the two equal.
"""

from __future__ import annotations

import enum


class Status(enum.IntEnum):
    """Exit statuses that are kvmctl's; with ``run`` and ``wait --exit-status`` all others are the guest's own."""

    DONE = 0
    """It was done."""
    NOT_YET = 1
    """What was waited for did not happen in the time allowed."""
    REQUEST = 120
    """The command line, a file or the request cannot be carried out as written."""
    UNREACHABLE = 121
    """kvmd is not running, this user may not talk to it, or its host lacks something."""
    GUEST_FAULT = 122
    """The guest did something that it cannot go on from."""
    EXHAUSTED = 123
    """The machine ran out of something that kvmd bounds."""
    HOST_FAULT = 124
    """The host failed under the guest, or refused a change of it."""
    INTERNAL = 125
    """A bug of kvmd's or kvmctl's, or an answer that is none of kvmd's."""
    STOPPED = 126
    """Ended by Ctrl-C or a signal, or the guest was."""
    KILLED = 127
    """The guest was ended at once."""


def epilog(*lines: str) -> str:
    """Return the end of a command's help, with the statuses that every command may end with.

    Args:
        lines: statuses of the command's own, such as ``"1  the time was over"``.
    """
    common = (
        "0    it was done",
        *lines,
        f"{Status.REQUEST:d}  the command line, a file or the request is wrong, or needs another state",
        f"{Status.UNREACHABLE:d}  kvmd is not running, may not be asked by you, or its host lacks something",
        f"{Status.HOST_FAULT:d}  the host failed, or refused a change of the machine",
        f"{Status.INTERNAL:d}  a bug, or an answer that is none of kvmd's",
        f"{Status.STOPPED:d}  Ctrl-C or a signal",
    )
    return "\b\nExit status:\n" + "\n".join(f"  {line}" for line in common)
