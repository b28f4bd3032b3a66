"""How busy the host is at this moment."""

from __future__ import annotations

import os


def runnable_tasks() -> int:
    """Return how many threads of the host run or could, the caller's among them; 1 where the host does not tell.

    The fourth field of /proc/loadavg (proc(5)), which is no average. It takes some microseconds.
    """
    try:
        fd = os.open("/proc/loadavg", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return 1
    try:
        return int(os.read(fd, 128).split()[3].partition(b"/")[0])
    except (OSError, ValueError, IndexError):
        return 1
    finally:
        os.close(fd)
