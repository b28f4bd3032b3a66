"""What a memory fault looks like: the two layouts that KVM_EXIT_MEMORY_FAULT has had.

Pure decoding, without I/O. A fault that is not fully understood is never a request for a conversion.
"""

from __future__ import annotations

import errno as errno_codes
import struct
from mmap import mmap
from typing import Protocol

from kvmd.errors import ConfigError, MissingCapability
from kvmd.hv.exits import BadMemoryFault, FaultDefect, MemoryFault
from kvmd.kvm.run_page import (
    KVM_EXIT_MEMORY_FAULT,
    KVM_MEMORY_EXIT_FLAG_PRIVATE,
    RFC_EXIT_MEMORY_FAULT,
    RFC_MEMORY_EXIT_FLAG_PRIVATE,
    UNION_OFFSET,
)

RunPage = mmap | bytes | bytearray | memoryview
"""A ``struct kvm_run`` to read, mapped or copied."""

EHWPOISON = 133
"""Memory page has hardware error (asm-generic/errno.h); Python's errno has it since 3.14 only."""

_DEFECTS = {
    errno_codes.EFAULT: FaultDefect.UNKNOWN_FLAGS,
    EHWPOISON: FaultDefect.POISONED,
    # guest_memfd had no page to give. Outside the documented contract: told to the log, never acted upon.
    errno_codes.ENOMEM: FaultDefect.OUT_OF_MEMORY,
}
"""What a reason-39 exit is that is no request for a conversion, by the errno of KVM_RUN."""

_MERGED = struct.Struct("=QQQ")  # flags, gpa, size: ExitMemoryFault
_RFC_V9 = struct.Struct("=IIQQ")  # flags, padding, gpa, size: ExitMemory


class FaultLayout(Protocol):
    """How a kernel reports a memory fault."""

    @property
    def name(self) -> str:
        """The layout's name in ``kvmd check`` and in the configuration."""

    def decode(self, result: int, errno: int, exit_reason: int, run: RunPage) -> MemoryFault | BadMemoryFault | None:
        """Return the memory fault that KVM_RUN reports, or None where it reports none.

        Args:
            result: what ioctl(2) returned, 0 or -1.
            errno: its error number; means nothing unless ``result`` is -1.
            exit_reason: ``kvm_run.exit_reason``, which was 0 when KVM_RUN was called.
            run: the vCPU's ``struct kvm_run``.
        """


class MergedLayout:
    """The layout of Linux 6.8 and later: KVM_RUN fails, with exit reason 39.

    Documentation/virt/kvm/api.rst, 5. The kvm_run structure, KVM_EXIT_MEMORY_FAULT: the union is valid only
    when KVM_RUN failed with EFAULT or EHWPOISON and the exit reason says so. Flags are kept open: an access
    with a bit that kvmd does not know may be of a kind that no conversion answers.
    """

    name = "merged"

    def decode(self, result: int, errno: int, exit_reason: int, run: RunPage) -> MemoryFault | BadMemoryFault | None:
        """Decode; see ``FaultLayout.decode``."""
        if result == 0:
            return None
        if exit_reason == KVM_EXIT_MEMORY_FAULT:
            flags, gpa, size = _MERGED.unpack_from(run, UNION_OFFSET)
            if errno == errno_codes.EFAULT and not flags & ~KVM_MEMORY_EXIT_FLAG_PRIVATE:
                return MemoryFault(gpa, size, flags != 0)
            defect = _DEFECTS.get(errno)
            return None if defect is None else BadMemoryFault(defect, gpa, size, flags, errno)
        return _bare_failure(errno)


class RfcV9Layout:
    """The layout of the RFC's version 9, never merged: KVM_RUN returns 0, with exit reason 38."""

    name = "rfc-v9"

    def decode(self, result: int, errno: int, exit_reason: int, run: RunPage) -> MemoryFault | BadMemoryFault | None:
        """Decode; see ``FaultLayout.decode``."""
        if result != 0:
            return _bare_failure(errno)
        if exit_reason != RFC_EXIT_MEMORY_FAULT:
            return None
        flags, _padding, gpa, size = _RFC_V9.unpack_from(run, UNION_OFFSET)
        if flags & ~RFC_MEMORY_EXIT_FLAG_PRIVATE:
            return BadMemoryFault(FaultDefect.UNKNOWN_FLAGS, gpa, size, flags, 0)
        return MemoryFault(gpa, size, flags != 0)


def _bare_failure(errno: int) -> BadMemoryFault | None:
    """Return the fault that a failed KVM_RUN without a memory-fault exit stands for."""
    # A slot whose host mapping is missing or PROT_NONE: no address is known, so nothing can be converted.
    if errno == errno_codes.EFAULT:
        return BadMemoryFault(FaultDefect.NO_INFORMATION, None, None, None, errno)
    if errno == EHWPOISON:
        return BadMemoryFault(FaultDefect.POISONED, None, None, None, errno)
    return None


MERGED = MergedLayout()
RFC_V9 = RfcV9Layout()

LAYOUTS: tuple[FaultLayout, ...] = (MERGED, RFC_V9)
"""Every layout, newest first."""


def choose_layout(*, memory_fault_info: bool, requested: str | None = None) -> FaultLayout:
    """Return the layout to decode this kernel's memory faults with.

    A kernel that reports KVM_CAP_MEMORY_FAULT_INFO speaks ``merged`` and nothing else: to it, 38 is
    KVM_EXIT_LOONGARCH_IOCSR. On any other kernel for x86, 38 can only come from the RFC's patches, so
    ``rfc-v9`` is safe there, and decodes no fault at all where they are absent.

    Args:
        memory_fault_info: whether the kernel reports KVM_CAP_MEMORY_FAULT_INFO.
        requested: a layout's name that the operator insists on, or None to choose.

    Raises:
        ConfigError: no layout has that name, or the kernel's capability contradicts it.
        MissingCapability: ``merged`` was requested of a kernel that does not speak it.
    """
    chosen = MERGED if memory_fault_info else RFC_V9
    if requested is None or requested == chosen.name:
        return chosen
    if requested == MERGED.name:
        raise MissingCapability(
            "KVM_CAP_MEMORY_FAULT_INFO",
            "the fault layout 'merged' needs KVM_CAP_MEMORY_FAULT_INFO, which this kernel lacks: "
            "use Linux 6.8 or later, or leave the layout out",
        )
    if requested == RFC_V9.name:
        raise ConfigError(
            "the fault layout 'rfc-v9' is not what this kernel speaks, since it reports "
            "KVM_CAP_MEMORY_FAULT_INFO: leave the layout out, or write 'merged'"
        )
    names = ", ".join(repr(layout.name) for layout in LAYOUTS)
    raise ConfigError(f"there is no fault layout {requested!r}: write one of {names}, or leave it out")
