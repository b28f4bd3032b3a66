"""Which process a machine is: a number alone may be another's by now."""

from __future__ import annotations

import os

from kvmd.machine_process.folder import PROCESS, BadFile, MachineFolder, ProcessFile, start_ticks


def process_of(folder: MachineFolder) -> ProcessFile:
    """Return which process a machine is, or was; one of number 0 where its folder does not say."""
    try:
        found = folder.read(PROCESS, ProcessFile)
    except BadFile:
        found = None
    return found if found is not None else ProcessFile(0, 0, "")


def open_pidfd(pid: int, ticks: int | None) -> int | None:
    """Return a descriptor of the process, or None where there is none, or a later one of the same number.

    Args:
        pid: its number.
        ticks: when it started; None for a child of whoever told the number, which cannot have been used again.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return None
    # In this order: what was looked at is then what the descriptor is of, or gone.
    if ticks is not None and start_ticks(pid) != ticks:
        os.close(pidfd)
        return None
    return pidfd
