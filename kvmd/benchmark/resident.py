"""What a process has in memory (proc(5), smaps_rollup)."""

from __future__ import annotations

from pathlib import Path

from kvmd.benchmark.measure import CannotMeasure


def pss_mib(pid: int) -> float:
    """Return a process's proportional share: memory that several have counts for each with its part of it.

    Raises:
        CannotMeasure: there is no such process, or it may not be looked at.
    """
    return _field(pid, "Pss:")


def rss_mib(pid: int) -> float:
    """Return all that a process has, what it shares with others included.

    Raises:
        CannotMeasure: as ``pss_mib``.
    """
    return _field(pid, "Rss:")


def _field(pid: int, name: str) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError as error:
        raise CannotMeasure(f"the memory of process {pid} cannot be read: {error.strerror}") from error
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))
