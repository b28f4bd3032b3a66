"""The ioctl system call, and how its request numbers are put together."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from fcntl import ioctl as _fcntl_ioctl
from typing import NoReturn

# asm-generic/ioctl.h: bits 7:0 number, 15:8 type, 29:16 size of the argument, 31:30 direction.
_TYPE_SHIFT = 8
_SIZE_SHIFT = 16
_DIRECTION_SHIFT = 30
_SIZE_LIMIT = 1 << 14
_NONE, _WRITE, _READ = 0, 1, 2

KVMIO = 0xAE
"""The type of all of KVM's ioctls."""


def _number(direction: int, number: int, size_bytes: int) -> int:
    if not 0 <= size_bytes < _SIZE_LIMIT:
        raise ValueError(f"an ioctl argument of {size_bytes} bytes does not fit its number")
    return direction << _DIRECTION_SHIFT | size_bytes << _SIZE_SHIFT | KVMIO << _TYPE_SHIFT | number


def io(number: int) -> int:
    """Return the request ``_IO(KVMIO, number)``: no argument, or an integer."""
    return _number(_NONE, number, 0)


def ior(number: int, argument: type[ctypes.Structure]) -> int:
    """Return the request ``_IOR(KVMIO, number, argument)``: the kernel fills the argument."""
    return _number(_READ, number, ctypes.sizeof(argument))


def iow(number: int, argument: type[ctypes.Structure]) -> int:
    """Return the request ``_IOW(KVMIO, number, argument)``: the kernel reads the argument."""
    return _number(_WRITE, number, ctypes.sizeof(argument))


def iowr(number: int, argument: type[ctypes.Structure]) -> int:
    """Return the request ``_IOWR(KVMIO, number, argument)``: the kernel reads and fills the argument."""
    return _number(_READ | _WRITE, number, ctypes.sizeof(argument))


# Not fcntl.ioctl: since CPython 3.14 that retries EINTR in C, so a kicked KVM_RUN would never come back.
# A CFUNCTYPE prototype of libc's function drops the GIL for the call and swaps errno right around it.
_PROTOTYPE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p, use_errno=True)

raw_ioctl: Callable[[int, int, int], int] = _PROTOTYPE(("ioctl", ctypes.CDLL(None)))
"""``raw_ioctl(fd, request, argument)``: returns what ioctl(2) returns, -1 with ``ctypes.get_errno()`` set.

``argument`` is an integer or the address of a structure that the caller keeps alive.
"""


quick_ioctl: Callable[[int, int, bytearray], int] = _fcntl_ioctl
"""``quick_ioctl(fd, request, argument)``: the same at a third of the price, for calls that no signal interrupts.

Since CPython 3.14 it would try those again by itself, and a kicked KVM_RUN must come back. Raises OSError.
"""


def raise_errno(operation: str) -> NoReturn:
    """Raise the OSError for the errno of the ``raw_ioctl`` call just made by this thread.

    Raises:
        OSError: always; its text names ``operation``.
    """
    errno = ctypes.get_errno()
    raise OSError(errno, f"{operation}: {os.strerror(errno)}")


def ioctl(fd: int, request: int, argument: int, operation: str) -> int:
    """Make the system call once and return its result, which is not negative.

    Raises:
        OSError: with the call's errno (EINTR and EAGAIN included); its text names ``operation``.
    """
    result = raw_ioctl(fd, request, argument)
    if result < 0:
        raise_errno(operation)
    return result
