"""What a machine's process asks of its machine: ``kvmd.machine.Machine``, and a fake of it in tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from kvmd.devices.console_input import ConsoleInput
from kvmd.runnable import Runnable
from kvmd.spec.machine import MachineSpec
from kvmd.virtio.host_port import HostPort


class Readable(Protocol):
    """Guest memory as the host may see it."""

    def read(self, gpa: int, size_bytes: int) -> bytes:
        """Copy shared memory. Raises PrivateMemory, and IndexError outside of memory."""


class Balloon(Protocol):
    """Memory that the guest does without; sizes in bytes."""

    @property
    def target_bytes(self) -> int:
        """What it is asked for."""

    @property
    def actual_bytes(self) -> int:
        """What it says that it does without."""

    @property
    def discarded_bytes(self) -> int:
        """What the host has taken back so far."""

    def set_target(self, size_bytes: int) -> None:
        """Ask the guest to do without that much. Raises ValueError."""


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

    @property
    def agent(self) -> HostPort | None:
        """The host's end of a program in the guest, if it has a port."""

    @property
    def balloon(self) -> Balloon | None:
        """Its balloon, if it has one."""

    def held_bytes(self) -> int:
        """Return how much of the host's memory the guest's takes up."""

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
