"""The cgroup that a machine's process is in: which unit's it is, and which limits it really has (cgroup-v2.rst)."""

from __future__ import annotations

import re
from pathlib import Path

from kvmd.spec.limits import TASKS_LIMIT, LimitsSpec

_MOUNT = Path("/sys/fs/cgroup")
_UNIT = re.compile(r"kvmd-machine@([1-9][0-9]{0,8})\.service", re.ASCII)
_NONE = "max"
_CLOSE = 0.01


def unit_name(number: int) -> str:
    """Return the name of the unit of that number: see systemd/kvmd-machine@.service."""
    return f"kvmd-machine@{number}.service"


def unit_number(name: str) -> int | None:
    """Return the number of a machine's unit, or None where it is another's name, or none at all."""
    found = _UNIT.fullmatch(name)
    return None if found is None else int(found[1])


def cgroup_of(process: int | str = "self") -> Path:
    """Return the folder of the process's cgroup.

    Raises:
        OSError: there is no such process.
    """
    text = Path(f"/proc/{process}/cgroup").read_text(encoding="utf-8", errors="surrogateescape")
    # The line of version 2: "0::/kvmd.slice/kvmd-machine@1.service" (cgroups(7)).
    path = next((line[3:] for line in text.splitlines() if line.startswith("0::")), "/")
    return _MOUNT / path.lstrip("/")


def lacking_limits(limits: LimitsSpec, cgroup: Path, *, exactly: bool = False) -> list[str]:
    """Return what of the limits is not in force there, each as a few words.

    Args:
        limits: as a machine's spec has them.
        cgroup: the folder.
        exactly: a limit that the spec does not have must not be there either, and one that it has must be no lower.
    """
    lacking = []
    for key, file, wanted, found in (
        ("memory", "memory.max", limits.memory, _number(cgroup / "memory.max")),
        ("cpus", "cpu.max", limits.cpus, _processors(cgroup / "cpu.max")),
        ("tasks", "pids.max", limits.tasks or (TASKS_LIMIT if exactly else None), _number(cgroup / "pids.max")),
    ):
        close = found is not None and wanted is not None and abs(found - wanted) <= wanted * _CLOSE
        if wanted is None:
            holds = found is None or not exactly
        else:
            holds = close or (found is not None and found < wanted and not exactly)
        if not holds:
            has = "none" if found is None else f"{found:.15g}"
            lacking.append(f"limits.{key} ({file} is {has}, not {_NONE if wanted is None else format(wanted, '.15g')})")
    return lacking


def _number(file: Path) -> float | None:
    text = _read(file)
    return float(text) if text.isdigit() else None


def _processors(file: Path) -> float | None:
    """Return quota over period, or None where there is no quota."""
    quota, _, period = _read(file).partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else None


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii").strip()
    except OSError:
        return ""  # the controller is not on, or the kernel has none
