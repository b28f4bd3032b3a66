"""Ends waits that last too long, for waits too many and too short to have a timeout each.

A timeout is a timer of the kernel's that is set and cancelled, and some arithmetic: for a wait that is nearly always
short it costs as much as a seventh of a hand-off between two threads (``kvmd bench handoff``). So such a wait has none,
and a thread looks now and then, while there are any, whether the one it saw last time still goes on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue


class WaitWatch:
    """Watches the waits of one thread.

    That thread does this around each::

        watch.waiting = True
        if watch.watching or watch.resume():
            ...  # wait
        watch.waiting = False

    There is no lock. The waiting thread says that it waits before it looks whether it is watched, and the watching one
    that it watches no more before it looks whether anybody waits; so at least one of the two notices.

    Args:
        seconds: from one look to the next: a wait is ended after one to two of these.
        progress: a number that changes with each wait.
        end: ends the wait. From the watching thread; perhaps just after the wait ended by itself.

    Attributes:
        waiting: a wait goes on.
        watching: nobody needs to call ``resume``.
    """

    __slots__ = ("_end", "_orders", "_progress", "_seconds", "_thread", "waiting", "watching")

    def __init__(self, seconds: float, progress: Callable[[], int], end: Callable[[], None]) -> None:
        self.waiting = False
        self.watching = False
        self._seconds = seconds
        self._progress = progress
        self._end = end
        # True: watch; False: end.
        self._orders: SimpleQueue[bool] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def resume(self) -> bool:
        """Watch again, until there are no waits for some time; false where the host gives no thread for it."""
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="kvmd-wait-watch", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the limit of processes or tasks is reached
                return False
            self._thread = thread
        self.watching = True
        self._orders.put(item=True)
        return True

    def close(self) -> None:
        """End the thread, once nobody waits any more; harmless the second time."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._orders.put(item=False)
            thread.join()

    def _run(self) -> None:
        while self._orders.get():
            if not self._watch():
                return

    def _watch(self) -> bool:
        """Look at intervals until nobody waits any more; tell whether to go on afterwards."""
        seen = -1
        while True:
            try:
                if not self._orders.get(timeout=self._seconds):
                    return False
            except Empty:
                pass
            progress = self._progress()
            if progress == seen:
                if self._anybody_waits():
                    self._end()
                else:
                    self.watching = False
                    if not self._anybody_waits():
                        return True
                    self.watching = True
            seen = progress

    def _anybody_waits(self) -> bool:
        # A method, since a type checker believes that what it saw once stays so.
        return self.waiting
