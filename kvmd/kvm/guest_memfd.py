"""Memory that only a guest uses: a guest_memfd."""

from __future__ import annotations

import ctypes
import os

from kvmd.errors import BackendError
from kvmd.kvm.fd import OwnedFd

FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02

# os.posix_fallocate takes no mode. The offsets are off_t, 64 bits on every machine that has KVM for x86-64.
_PROTOTYPE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64, use_errno=True)
_fallocate = _PROTOTYPE(("fallocate", ctypes.CDLL(None)))


class GuestMemfd(OwnedFd):
    """A guest_memfd (Documentation/virt/kvm/api.rst, 4.142 KVM_CREATE_GUEST_MEMFD).

    A memslot bound to it outlives it: once its last descriptor is closed, every access through the slot is a
    memory fault. A tripwire is just that.

    Attributes:
        size: length in bytes.
    """

    __slots__ = ("size",)

    def __init__(self, fd: int, size: int) -> None:
        super().__init__(fd, "guest_memfd")
        self.size = size

    def punch_hole(self, offset: int, size: int) -> None:
        """Give the pages of ``[offset, offset + size)`` bytes back to the host; the guest then reads zeros.

        Raises:
            BackendError: the kernel refused, such as EINVAL for a range that is not page-aligned.
            ValueError: the guest_memfd is closed.
        """
        if _fallocate(self.fileno(), FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, offset, size):
            errno = ctypes.get_errno()
            raise BackendError(
                f"cannot punch a hole of {size:#x} bytes at {offset:#x} into a guest_memfd of {self.size:#x} "
                f"bytes: {os.strerror(errno)}",
                errno,
            ) from OSError(errno, os.strerror(errno))
