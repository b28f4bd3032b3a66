"""Memory attributes: one ioctl for a range, all of it or nothing, whatever memslots there are.

KVM never looks at memslots here (virt/kvm/kvm_main.c, kvm_vm_set_mem_attributes, Linux 6.8 to 7.3): it takes time and
memory for each page of the range, under a lock of the whole VM, and it reserves all memory before it changes anything.
"""

from __future__ import annotations

import errno as errno_codes
from collections.abc import Iterator
from contextlib import suppress

from kvmd.errors import BackendError
from kvmd.protection.vm import AttributeVm, F
from kvmd.ranges import GpaRange
from kvmd.units import MIB, TIB

ATTRIBUTE_PRIVATE = 1 << 3
"""KVM_MEMORY_ATTRIBUTE_PRIVATE (linux/kvm.h)."""

CHUNK_BYTES = 64 * MIB
"""The most memory whose attributes are set by one ioctl while no guest runs; with guests the rules have a smaller
bound, conversion.chunk. Measured: 20 to 60 nanoseconds a page."""

SLOT_BYTES = TIB
"""The largest memslot that is asked for. KVM's own limit is 2^31 - 1 pages (KVM_MEM_MAX_NR_PAGES)."""


def parts(range_: GpaRange, size_bytes: int) -> Iterator[GpaRange]:
    """Yield the range in parts of at most ``size_bytes``, in order, cut at multiples of that size."""
    start = range_.start
    while start < range_.end:
        end = min((start // size_bytes + 1) * size_bytes, range_.end)
        yield GpaRange(start, end)
        start = end


def set_in_chunks(vm: AttributeVm[F], range_: GpaRange, attributes: int) -> None:
    """Set the attributes of a range of any size.

    Raises:
        BackendError: KVM refused; an unknown part of the range has them.
    """
    for part in parts(range_, CHUNK_BYTES):
        vm.set_memory_attributes(part, attributes)


def remove_slots(vm: AttributeVm[F], slots: list[GpaRange]) -> None:
    """Remove memslots together with the attributes of their pages, the last one first.

    Args:
        vm: where they are.
        slots: the memory of each, by number; empty when this returns.
    """
    while slots:
        # What KVM does not take back goes with the VM.
        with suppress(BackendError):
            range_ = slots.pop()
            vm.delete_memory_region(len(slots))
            set_in_chunks(vm, range_, 0)


def told(error: BackendError) -> str:
    """Return what a refusal says, with the error's name as man pages have it."""
    name = errno_codes.errorcode.get(error.errno)
    return f"{error} ({name})" if name else str(error)
