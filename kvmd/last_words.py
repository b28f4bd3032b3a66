"""What is said of an exit that a machine cannot go on from."""

from __future__ import annotations

from typing import assert_never

from kvmd.hv.exits import EmulatorFailed, Halted, Shutdown, SystemEvent, UnexpectedExit, UnsupportedInstruction
from kvmd.stop import StopReason

FatalExit = Shutdown | Halted | SystemEvent | UnexpectedExit | UnsupportedInstruction | EmulatorFailed


def last_words(exit_: FatalExit) -> tuple[StopReason, str]:
    """Return why the machine stops, and the line that says so."""
    match exit_:
        case Shutdown():
            return (
                StopReason.TRIPLE_FAULT,
                "triple fault: an exception that the guest has no handler for (payload guests have none at all)",
            )
        case Halted():
            return StopReason.HALTED, "halted for good: HLT with nothing that could interrupt it"
        case SystemEvent():
            return StopReason.SYSTEM_EVENT, f"KVM system event {exit_.event}"
        case UnexpectedExit():
            return StopReason.UNEXPECTED_EXIT, f"{exit_.name}: {exit_.detail}"
        case UnsupportedInstruction():
            return (
                StopReason.UNSUPPORTED_INSTRUCTION,
                f"the software CPU does not have this {_instruction(exit_)}: use KVM, or leave it out",
            )
        case EmulatorFailed():
            return StopReason.EMULATOR_FAILED, f"the software CPU failed ({exit_.error}) at the {_instruction(exit_)}"
        case _:
            assert_never(exit_)


def _instruction(exit_: UnsupportedInstruction | EmulatorFailed) -> str:
    return f"instruction at {exit_.address:#x} ({exit_.code.hex(' ') or 'which cannot be read'})"
