"""What protections ask of a virtual machine: memslots, guest_memfds, memory attributes."""

from __future__ import annotations

from typing import Protocol, TypeVar

from kvmd.ranges import GpaRange


class ClosableFd(Protocol):
    """A guest_memfd, as far as a tripwire needs it."""

    def close(self) -> None:
        """Close it."""


class PunchableFd(ClosableFd, Protocol):
    """A guest_memfd that stays open, so that its pages can be given back."""

    def punch_hole(self, offset: int, size: int) -> None:
        """Give the pages of ``[offset, offset + size)`` bytes back. Raises BackendError."""


F = TypeVar("F", bound=ClosableFd)
M = TypeVar("M", bound=PunchableFd)


class SlotVm(Protocol[F]):
    """A VM with memslots and guest_memfds."""

    def set_memory_region(
        self,
        slot: int,
        gpa: int,
        size_bytes: int,
        userspace_addr: int,
        flags: int = 0,
        guest_memfd: F | None = None,
        guest_memfd_offset: int = 0,
    ) -> None:
        """Create a memslot. Raises BackendError."""

    def delete_memory_region(self, slot: int) -> None:
        """Delete a memslot; the attributes of its pages stay. Raises BackendError."""

    def swap_views(
        self,
        dying: int,
        tripwire_gpa: int,
        inaccessible: int,
        memfd: F,
        rising: int,
        live_gpa: int,
        userspace_addr: int,
        size_bytes: int,
    ) -> None:
        """Make the other view of some pages live, in four steps with as little as possible between them.

        Delete the memslot ``dying``; create it again at ``tripwire_gpa``, on addresses that nothing can access and on
        ``memfd``, which is closed in any case; delete the memslot ``rising``; create it again at ``live_gpa``.

        Raises SwapFailed, which says how many of the steps were made.
        """

    def create_guest_memfd(self, size_bytes: int, flags: int = 0) -> F:
        """Create a guest_memfd. Raises BackendError."""


class AttributeVm(SlotVm[F], Protocol[F]):
    """A VM whose pages have attributes, too."""

    def set_memory_attributes(self, gpa_range: GpaRange, attributes: int) -> None:
        """Set the attributes of every page of the range, of all or of none. Raises BackendError."""
