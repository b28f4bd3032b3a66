"""A thread for one piece of work, which nobody uses again.

Work on networks has to have one: pyroute2 runs an event loop of its own, which must not meet trio's; and a thread that
has entered another network namespace (setns(2)) must not go back to a pool.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def in_own_thread(work: Callable[[], T]) -> T:
    """Do the work in a new thread, wait for it, and return its result or raise its exception."""
    future: Future[T] = Future()

    def do() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            future.set_exception(error)

    thread = threading.Thread(target=do, name="kvmd-network")
    thread.start()
    try:
        return future.result()
    finally:
        # Also after Ctrl-C: what was begun is then whole, and its owner undoes it.
        thread.join()
