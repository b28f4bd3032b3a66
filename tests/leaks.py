"""What a test leaves behind: threads and file descriptors."""

from __future__ import annotations

import os
import re
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

_IDLE_WORKER = re.compile(r"Trio thread [0-9]+")
"""The name of a worker thread in trio's cache, where it waits ten seconds for its next job. One with a job carries
the job's name, and gets this one back before the job's result is delivered (trio/_core/_thread_cache.py): so a worker
that was abandoned in a job, such as a vCPU stuck in KVM_RUN, is never taken for an idle one."""

GRACE_SECONDS = 20.0
"""How long an abandoned worker may take to end its job after the test let it go. Every other thread of a test is
joined by the test itself, so nothing waits this long but a test that fails."""


@dataclass(frozen=True, slots=True)
class Belongings:
    """Threads and descriptors of this process at one moment.

    Attributes:
        threads: all that run but idle workers of trio's cache.
        fds: each as ``number -> what it is open on``, so that a number that was used anew shows.
    """

    threads: frozenset[threading.Thread]
    fds: frozenset[str]

    @classmethod
    def now(cls) -> Self:
        """Look."""
        return cls(_busy_threads(), open_fds())

    def left_behind(self, *, grace_seconds: float = GRACE_SECONDS) -> list[str]:
        """Return a line for everything that is here now and was not then.

        What pytest itself keeps open (the files behind its capture) is as old as the session or, with ``capfd``, gone
        before this is asked, since that fixture is set up after the one that calls this.
        """
        deadline = time.monotonic() + grace_seconds
        while extra := _busy_threads() - self.threads:
            left = deadline - time.monotonic()
            if left <= 0:
                break
            # An idle worker does not end but goes back to its cache: look again and again, not only when one ends.
            next(iter(extra)).join(min(left, 0.01))
        lines = [f"thread {thread.name!r}" for thread in sorted(extra, key=lambda thread: thread.name)]
        return lines + [f"fd {fd}" for fd in sorted(open_fds() - self.fds)]


def open_fds() -> frozenset[str]:
    """Return this process's descriptors as ``number -> target``."""
    found = set()
    for number in os.listdir("/proc/self/fd"):  # noqa: PTH208  strings are all that is wanted, at every test
        # The descriptor that the listing itself had open is gone by now.
        with suppress(FileNotFoundError):
            found.add(f"{number} -> {os.readlink(f'/proc/self/fd/{number}')}")  # noqa: PTH115  as above
    return frozenset(found)


def _busy_threads() -> frozenset[threading.Thread]:
    return frozenset(thread for thread in threading.enumerate() if not _IDLE_WORKER.fullmatch(thread.name))
