"""Memory of a guest that never converts: anonymous, so that the host may give it huge pages."""

from __future__ import annotations

import mmap

from kvmd.errors import BackendError
from kvmd.memory import libc
from kvmd.memory.host_memory import HostMemory, too_much
from kvmd.ranges import GpaRange
from kvmd.units import MIB

_HUGE = 2 * MIB


class AnonymousMemory(HostMemory):
    """Guest memory in transparent huge pages, where the host has them (``transparent_hugepage/enabled``).

    A memfd gets none under most hosts' settings (``shmem_enabled`` is ``never``), so that a guest that touches its
    memory for the first time leaves once for every 4 KiB, and its page walks are a level longer for ever.

    Args:
        name: as in ``HostMemory``.
        size_bytes: a multiple of the page.

    Raises:
        HostError: the host cannot map that much.
    """

    def __init__(self, name: str, size_bytes: int) -> None:
        try:
            # KVM maps a huge page only where both addresses are aligned to one.
            address = libc.map_anonymous(size_bytes, alignment=_HUGE)
        except (OSError, OverflowError) as error:
            raise too_much(size_bytes, error) from error
        super().__init__(name, size_bytes, address)
        # Of both only the effect is missed where this kernel was built without.
        libc.advise(address, size_bytes, mmap.MADV_HUGEPAGE, ignore_unsupported=True)
        # A child that runs a program of its own must not make the guest's next writes copies.
        libc.advise(address, size_bytes, mmap.MADV_DONTFORK, ignore_unsupported=True)

    def discard(self, range_: GpaRange) -> None:
        """Give the pages back to the host; they read as zeros from now on.

        Raises:
            BackendError: the host refused.
        """
        try:
            libc.advise(self.address + range_.start, range_.size_bytes, mmap.MADV_DONTNEED)
        except OSError as error:
            raise BackendError(f"discarding {self.name} {range_}: {error}", error.errno or 0) from error

    def held_bytes(self) -> int:
        """Return the host memory that is held, in bytes: 0 once it is closed."""
        return 0 if self._closed else libc.resident_bytes(self.address, self.size_bytes)
