"""Why a machine stopped, and the exit status that says so.

A guest's own exit statuses are passed on as they are: 0 to 119 and 128 to 255. Those between are kvmd's. A Linux
guest has no status of its own: powering off is 0, rebooting 133.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from kvmd.hv.vcpu import Registers

RESERVED_STATUSES = range(120, 128)
"""Exit statuses that kvmd keeps for itself: a guest that asks for one is stopped."""


class ExitStatus(enum.IntEnum):
    """What ``kvmd run`` exits with when it is not the guest's own status."""

    CONFIG = 120
    """The command line, the machine's file or the guest image cannot be carried out as written."""
    HOST = 121
    """The host lacks a device, a permission, a capability or memory."""
    GUEST_FAULT = 122
    """The guest did something that it cannot go on from, such as a triple fault."""
    EXHAUSTED = 123
    """The machine ran out of something that kvmd bounds, such as memslots."""
    HOST_FAULT = 124
    """The host failed under the running guest, such as poisoned memory."""
    INTERNAL = 125
    """A bug of kvmd's."""
    STOPPED = 126
    """The operator asked it to stop (SIGINT or SIGTERM)."""
    KILLED = 127
    """The operator asked twice."""


class LinuxStatus(enum.IntEnum):
    """What it exits with when a Linux guest ended in order."""

    POWERED_OFF = 0
    REBOOT = 133
    """The guest's machine ends with it; systemd-nspawn's status for the same, which a unit can act on."""


class StopReason(enum.Enum):
    """Why a machine stopped: the name in the log, and the exit status."""

    GUEST_EXIT = "guest-exit"
    GUEST_POWER_OFF = "guest-power-off"
    GUEST_REBOOT = "guest-reboot"
    GUEST_PANIC = "guest-panic"
    OPERATOR = "operator"
    KILLED = "killed"

    TRIPLE_FAULT = "triple-fault"
    HALTED = "halted"
    EMULATION_FAILURE = "emulation-failure"
    UNSUPPORTED_INSTRUCTION = "unsupported-instruction"
    UNEXPECTED_EXIT = "unexpected-exit"
    SYSTEM_EVENT = "system-event"
    RESERVED_STATUS = "reserved-exit-status"
    FAULT_OUTSIDE_MEMORY = "fault-outside-memory"
    FETCH_OUTSIDE_MEMORY = "fetch-outside-memory"
    PINNED_MEMORY = "pinned-memory"
    IMPLICIT_DENIED = "implicit-conversion-denied"
    NO_PROGRESS = "no-progress"
    UNKNOWN_FAULT_FLAGS = "memory-fault-unknown-flags"

    MEMSLOTS_EXHAUSTED = "memslots-exhausted"
    STATE_EXHAUSTED = "page-state-exhausted"

    MEMORY_POISONED = "memory-poisoned"
    FAULT_WITHOUT_INFORMATION = "memory-fault-without-information"
    HOST_OUT_OF_MEMORY = "host-out-of-memory"
    DISCARD_FAILED = "discard-failed"
    BACKEND_FAILED = "backend-failed"
    EMULATOR_FAILED = "emulator-failed"
    VCPU_STUCK = "vcpu-stuck"

    BUG = "bug"

    @property
    def exit_status(self) -> ExitStatus | LinuxStatus:
        """The exit status for this reason; a guest's own exit has none.

        Raises:
            ValueError: for ``GUEST_EXIT``, whose status is the guest's.
        """
        if self is StopReason.GUEST_EXIT:
            raise ValueError("the exit status of guest-exit is the guest's own")
        return _EXIT_STATUS.get(self, ExitStatus.GUEST_FAULT)


_EXIT_STATUS: dict[StopReason, ExitStatus | LinuxStatus] = {
    StopReason.GUEST_POWER_OFF: LinuxStatus.POWERED_OFF,
    StopReason.GUEST_REBOOT: LinuxStatus.REBOOT,
    StopReason.OPERATOR: ExitStatus.STOPPED,
    StopReason.KILLED: ExitStatus.KILLED,
    StopReason.MEMSLOTS_EXHAUSTED: ExitStatus.EXHAUSTED,
    StopReason.STATE_EXHAUSTED: ExitStatus.EXHAUSTED,
    StopReason.MEMORY_POISONED: ExitStatus.HOST_FAULT,
    StopReason.FAULT_WITHOUT_INFORMATION: ExitStatus.HOST_FAULT,
    StopReason.HOST_OUT_OF_MEMORY: ExitStatus.HOST_FAULT,
    StopReason.DISCARD_FAILED: ExitStatus.HOST_FAULT,
    StopReason.BACKEND_FAILED: ExitStatus.HOST_FAULT,
    StopReason.EMULATOR_FAILED: ExitStatus.HOST_FAULT,
    StopReason.VCPU_STUCK: ExitStatus.HOST_FAULT,
    StopReason.BUG: ExitStatus.INTERNAL,
}


STOPPED = "stopped by the operator"
NOT_SHUT_DOWN = f"{STOPPED}: the guest did not shut down when its power button was pressed"
"""Messages of ``StopReason.OPERATOR``."""


@dataclass(frozen=True, slots=True)
class Stop:
    """A machine's end.

    Attributes:
        reason: its name.
        message: one line: what happened, with gpa, size and flags where they matter.
        status: the exit status, 0 to 255.
        vcpu: the vCPU that ended it, or None where none did.
        registers: that vCPU's registers, where they could be read.
    """

    reason: StopReason
    message: str
    status: int
    vcpu: int | None = None
    registers: Registers | None = None

    @classmethod
    def because(
        cls, reason: StopReason, message: str, *, vcpu: int | None = None, registers: Registers | None = None
    ) -> Stop:
        """Return the stop for any reason but ``GUEST_EXIT``, with the reason's exit status."""
        return cls(reason, message, reason.exit_status, vcpu, registers)
