"""Under what conditions something was measured: the host's load, the time its own host took away, and which Python."""

from __future__ import annotations

import os
import platform
import sysconfig
import time
from collections.abc import Mapping
from pathlib import Path

from kvmd import __version__

_STEAL = 7
"""The column of /proc/stat's cpu line that counts time taken by the host's other guests (proc(5), 'cpu')."""


class Conditions:
    """Notes how busy the host is with other things, from its construction on."""

    def __init__(self) -> None:
        self._before = os.getloadavg()[0]
        self._times = _cpu_times()
        self._began = time.monotonic()

    def as_json(self) -> dict[str, object]:
        """Return what holds now and held since, as what ``json.dumps`` takes.

        ``seconds`` is the time since, ``load_before`` and ``load_after`` are averages of a minute, ``stolen_percent``
        is of all CPU time since.
        """
        passed = [now - before for now, before in zip(_cpu_times(), self._times, strict=True)]
        return {
            "seconds": round(time.monotonic() - self._began, 1),
            "kvmd": __version__,
            "cpus": os.cpu_count(),
            "usable_cpus": len(os.sched_getaffinity(0)),
            "kernel": platform.release(),
            "python": platform.python_version(),
            "python_optimised": optimised(),
            "load_before": round(self._before, 2),
            "load_after": round(os.getloadavg()[0], 2),
            "stolen_percent": round(100 * passed[_STEAL] / sum(passed), 1) if sum(passed) else 0.0,
        }


def in_words(conditions: Mapping[str, object]) -> str:
    """Return one line."""
    built = "optimised" if conditions["python_optimised"] else "not built with profile-guided optimisation"
    return (
        f"{conditions['seconds']} s; {conditions['usable_cpus']} of {conditions['cpus']} CPUs, "
        f"Linux {conditions['kernel']}, load average {conditions['load_before']} to {conditions['load_after']}, "
        f"{conditions['stolen_percent']} % of CPU time stolen; Python {conditions['python']} ({built})"
    )


def optimised() -> bool:
    """Tell whether this Python was built with profile-guided optimisation: without, it takes up to twice as long.

    Debian's says nothing about it in its configuration, but is (debian/rules, ``profile-opt``).
    """
    words = f"{sysconfig.get_config_var('CONFIG_ARGS')} {sysconfig.get_config_var('PY_CFLAGS_NODIST')}"
    return "--enable-optimizations" in words or "-fprofile-use" in words or "deb_system" in sysconfig.get_scheme_names()


def _cpu_times() -> list[int]:
    first_line = Path("/proc/stat").read_text(encoding="ascii").partition("\n")[0]
    return [int(word) for word in first_line.split()[1:9]]
