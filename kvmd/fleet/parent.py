"""What starts machines' processes: the spawner, or systemd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import trio

from kvmd.spec.machine import MachineSpec


class Parent(Protocol):
    """Starts machines' processes: ``kvmd.fleet.spawner_link.SpawnerLink``, ``kvmd.fleet.unit_pool.UnitPool``."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Be there until cancelled; what was started goes on."""

    def check(self, spec: MachineSpec) -> None:
        """Refuse what this cannot do, before anything is made.

        Raises:
            ConfigError: limits that nothing would enforce.
        """

    async def spawn(self, fds: Sequence[int], spec: MachineSpec) -> str:
        """Have a process become a machine, with its limits in force, and return the name of its unit, or "".

        Args:
            fds: what it inherits, as ``kvmd.machine_process.process.Inheritance`` says.
            spec: of the machine.

        Raises:
            HostError: there is none.
        """

    def adopt(self, unit: str) -> None:
        """Leave the unit alone: a machine of an earlier daemon is in it."""

    def release(self, unit: str) -> None:
        """Clear away the unit of a process that has ended, or is about to; harmless where there is none."""
