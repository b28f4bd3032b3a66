"""A network namespace for a test: interfaces, /sys and /run of its own, in a thread that ends with the test.

Threads and processes that are started from it are in there too, so the code under test needs to know nothing.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from kvmd.network.own_thread import in_own_thread

P = ParamSpec("P")
T = TypeVar("T")

CAP_NET_ADMIN = 12  # linux/capability.h

_CLONE_NEWNS, _CLONE_NEWNET = 0x00020000, 0x40000000
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000
_SYS_CAPSET = 126  # x86-64
_CAPABILITY_VERSION_3 = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)


def own_network(test: Callable[P, T]) -> Callable[P, T]:
    """Let the test run in a network of its own that has nothing but a loopback interface, which is down."""

    @functools.wraps(test)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        def work() -> T:
            leave_network()
            return test(*args, **kwargs)

        return in_own_thread(work)

    return wrapped


def leave_network() -> None:
    """Take the calling thread into a network of its own.

    Raises:
        OSError: it may not.
    """
    _check(_libc.unshare(_CLONE_NEWNET | _CLONE_NEWNS))
    _check(_libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None))
    _check(_libc.mount(b"none", b"/sys", b"sysfs", 0, None))
    _check(_libc.mount(b"none", b"/run", b"tmpfs", 0, None))


def keep_capabilities(*numbers: int) -> None:
    """Take all capabilities but these from the calling thread, and from those that it starts."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    kept = sum(1 << number for number in numbers)
    low, high = kept & 0xFFFFFFFF, kept >> 32
    data = (ctypes.c_uint32 * 6)(low, low, 0, high, high, 0)
    _check(_libc.syscall(_SYS_CAPSET, header, data))


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"error {number}")
