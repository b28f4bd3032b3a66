"""What a machine's process asks of its machine: ``kvmd.machine.Machine``, and a fake of it in tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from kvmd.devices.console_input import ConsoleInput
from kvmd.runnable import Runnable
from kvmd.spec import MachineSpec


class Readable(Protocol):
    """Guest memory as the host may see it."""

    def read(self, gpa: int, size_bytes: int) -> bytes:
        """Copy shared memory. Raises PrivateMemory, and IndexError outside of memory."""


class HostedMachine(Runnable, Protocol):
    """A machine that is open, and can be started, paused, looked into and typed at."""

    @property
    def state(self) -> str:
        """``created``, ``running``, ``paused``, ``stopped`` or ``closed``."""

    @property
    def facts(self) -> Mapping[str, object]:
        """What its first log line says."""

    @property
    def typed(self) -> ConsoleInput:
        """What the guest reads from its console."""

    @property
    def memory(self) -> Readable:
        """Its shared memory."""

    async def pause(self) -> None:
        """Take all vCPUs out of the guest. Raises MachineStateError."""

    async def resume(self) -> None:
        """Let the vCPUs in again. Raises MachineStateError."""

    def close(self) -> None:
        """Give up everything, once ``run`` has returned."""


class OpenMachine(Protocol):
    """Makes machines: ``Machine.open``."""

    def __call__(self, spec: MachineSpec, *, files: Sequence[int] = ()) -> HostedMachine:
        """Build a machine. Raises KvmdError, and leaves nothing behind then."""
