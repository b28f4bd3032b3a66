"""What a machine's process may take of the host: the table ``[limits]`` of its file."""

from __future__ import annotations

import msgspec

from kvmd.toml_file import Keys
from kvmd.units import MIB, PAGE_MASK

VCPU_LIMIT = 4096
"""vCPUs, and so processors, that a file may ask for; how many this host allows is known when the machine is opened."""

LEAST_LIMIT = 64 * MIB
"""What ``limits.memory`` has to be, in bytes: about twice of what a machine's process takes before it has a guest."""

OWN_TASKS = 16
"""Threads that a machine's process may want beside its vCPUs'."""

TASKS_LIMIT = VCPU_LIMIT + 256
"""Threads that a machine's process may ever have: TasksMax= of systemd/kvmd-machine@.service."""

_LEAST_CPUS = 0.01
"""Below, a quota is less than the millisecond that the kernel schedules by (cgroup-v2, cpu.max)."""

_I64_LIMIT = 1 << 63

LIMITS_KEYS = {
    "limits.memory": 'a size from 64 MiB up in pages of 4 KiB, guest memory included, such as "512M"',
    "limits.cpus": f"a number of processors from {_LEAST_CPUS} to {VCPU_LIMIT}, such as 1.5",
    "limits.tasks": f"a whole number from {OWN_TASKS} more than vcpus to {TASKS_LIMIT}",
}
"""What would be right, by key: the second half of every message."""

_KEYS = Keys(LIMITS_KEYS)


class LimitsSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a machine's process may take of the host, enforced by the kernel (cgroup v2); None for no limit.

    Attributes:
        memory: bytes, in total: guest memory, and what kvmd needs for it. It is never swapped. A machine that wants
            more is ended, with the reason ``out-of-memory``.
        cpus: processors' time, in processors: 1.5 is one and a half.
        tasks: threads: one a vCPU, and up to 16 of kvmd's own.
    """

    memory: int | None = None
    cpus: float | None = None
    tasks: int | None = None

    def __post_init__(self) -> None:
        memory, cpus, tasks = self.memory, self.cpus, self.tasks
        whole = memory is None or (LEAST_LIMIT <= memory < _I64_LIMIT and not memory & PAGE_MASK)
        _KEYS.need("limits.memory", memory, whole)
        _KEYS.need("limits.cpus", cpus, cpus is None or _LEAST_CPUS <= cpus <= VCPU_LIMIT)
        _KEYS.need("limits.tasks", tasks, tasks is None or OWN_TASKS < tasks <= TASKS_LIMIT)

    @property
    def given(self) -> bool:
        """Whether there are any."""
        return self != LimitsSpec()
