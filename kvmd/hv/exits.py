"""Why a vCPU left the guest: frozen messages, matched exhaustively by ``kvmd.vcpu_tasks``.

A gpa in these messages is what the accelerator reported, C-bit included: only the machine's protection
knows what that bit means (see ``kvmd.protection``).
"""

from __future__ import annotations

import enum

import msgspec


class PortIo(msgspec.Struct, frozen=True):
    """An IN or OUT (KVM_EXIT_IO).

    Attributes:
        port: the port's number, 0 to 65535.
        size: bytes of one access: 1, 2 or 4.
        count: accesses in ``data`` (more than one for ``rep ins`` and ``rep outs``).
        is_write: true for OUT.
        data: ``size * count`` bytes written by the guest; empty for IN, which is answered with
            ``Vcpu.complete_read``.
    """

    port: int
    size: int
    count: int
    is_write: bool
    data: bytes


class Mmio(msgspec.Struct, frozen=True):
    """An access to guest-physical memory that nothing backs (KVM_EXIT_MMIO).

    Attributes:
        gpa: address in bytes, not aligned.
        size: 1 to 8 bytes.
        is_write: true for a store.
        data: ``size`` bytes stored by the guest; empty for a load, which is answered with
            ``Vcpu.complete_read``.
    """

    gpa: int
    size: int
    is_write: bool
    data: bytes


class MemoryFault(msgspec.Struct, frozen=True):
    """An access in the wrong state (KVM_EXIT_MEMORY_FAULT), with only flags that kvmd knows.

    Attributes:
        gpa: start of the range, in bytes.
        size: length in bytes.
        private: the access was to private memory, as the exit's flags say.
    """

    gpa: int
    size: int
    private: bool


class FaultDefect(enum.Enum):
    """Why a memory fault is no request for a conversion."""

    UNKNOWN_FLAGS = "memory-fault-unknown-flags"
    POISONED = "memory-poisoned"
    NO_INFORMATION = "memory-fault-without-information"
    OUT_OF_MEMORY = "host-out-of-memory"


class BadMemoryFault(msgspec.Struct, frozen=True):
    """A memory fault that must never be treated as a conversion.

    Attributes:
        defect: why not.
        gpa: address in bytes, or None where the kernel gave none.
        size: length in bytes, or None.
        flags: the exit's flags, or None.
        errno: what KVM_RUN failed with, or 0 where the layout returns 0.
    """

    defect: FaultDefect
    gpa: int | None
    size: int | None
    flags: int | None
    errno: int


class Hypercall(msgspec.Struct, frozen=True):
    """KVM_EXIT_HYPERCALL: answered with ``Vcpu.complete_hypercall``.

    Attributes:
        number: RAX, such as KVM_HC_MAP_GPA_RANGE (12).
        arguments: RBX, RCX, RDX (a0, a1, a2).
    """

    number: int
    arguments: tuple[int, int, int]


class Interrupted(msgspec.Struct, frozen=True):
    """KVM_RUN returned EINTR or EAGAIN: look at the commands, then enter again."""


class Halted(msgspec.Struct, frozen=True):
    """HLT with no in-kernel interrupt controller (KVM_EXIT_HLT)."""


class Shutdown(msgspec.Struct, frozen=True):
    """A triple fault (KVM_EXIT_SHUTDOWN)."""


class SystemEvent(msgspec.Struct, frozen=True):
    """KVM_EXIT_SYSTEM_EVENT; ``event`` is KVM's number of it."""

    event: int


class EmulationFailure(msgspec.Struct, frozen=True):
    """KVM could not emulate an instruction (KVM_INTERNAL_ERROR_EMULATION).

    Attributes:
        instruction: the bytes that KVM had fetched; empty where it could not.
    """

    instruction: bytes


class UnexpectedExit(msgspec.Struct, frozen=True):
    """Any other exit: nothing that kvmd can answer.

    Attributes:
        name: such as ``KVM_EXIT_FAIL_ENTRY`` or ``exit reason 99``.
        detail: what the exit says of itself, for the log.
    """

    name: str
    detail: str


class UnsupportedInstruction(msgspec.Struct, frozen=True):
    """The software CPU met an instruction that it does not have.

    Attributes:
        address: where, in the guest's address space.
        code: the bytes from there on, as far as they can be read.
    """

    address: int
    code: bytes


class EmulatorFailed(msgspec.Struct, frozen=True):
    """The software CPU gave up, for no reason that the guest gave it.

    Attributes:
        address: where it was, in the guest's address space.
        code: the bytes from there on, as far as they can be read.
        error: what the emulator says.
    """

    address: int
    code: bytes
    error: str


Exit = (
    PortIo
    | Mmio
    | MemoryFault
    | BadMemoryFault
    | Hypercall
    | Interrupted
    | Halted
    | Shutdown
    | SystemEvent
    | EmulationFailure
    | UnexpectedExit
    | UnsupportedInstruction
    | EmulatorFailed
)
