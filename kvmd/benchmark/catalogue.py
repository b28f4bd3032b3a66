"""The benchmarks there are: each is ``measure(options)`` in a module of its own, imported when it is called."""

from __future__ import annotations

import importlib
import logging
import subprocess
from collections.abc import Callable
from pathlib import Path

import structlog

from kvmd.benchmark.conditions import Conditions
from kvmd.benchmark.measure import CannotMeasure, Options, Report
from kvmd.errors import HostError, MachineSilent

SUMMARIES = {
    "conversions": "a conversion, end to end, beside the same KVM calls in C",
    "growth": "what a conversion costs by vCPUs, pages already converted, and memory",
    "handoff": "a vCPU thread's way to the service and back, beside a bare ping-pong of two threads",
    "large": "a large explicit conversion, GiB/s, beside the bare calls in C",
    "start": "a machine from its creation to its guest, cold and warmed, and idle memory, beside QEMU microvm",
    "api": "the control API: a small GET beside a bare h11 echo, and streams of events",
    "scale": "1 to 100 machines that convert at once: total, fairness, and the daemon's lag",
    "fleet": "the daemon's machines: creations in a row, idle ones, and streams that nobody reads",
    "post": "a machine over HTTP, from its POST to the guest's first output, beside QEMU microvm",
    "software": "conversions and instructions on the software CPU, beside KVM",
    "blocks": "the start and the first conversion, by the size of memory's first blocks",
    "memory": "host memory that large machines take before the guest touches any",
}
"""Benchmarks with one line each, in the order of `kvmd bench all`."""

_APART = {
    "profile": "where the time of a conversion goes, by function (needs py-spy; not part of `all`)",
    "linux": "a Linux guest beside QEMU microvm: to init, its disk and its network (in the lab; not part of `all`)",
}


def summaries() -> dict[str, str]:
    """Return all that can be asked for; `all` measures ``SUMMARIES``."""
    return SUMMARIES | _APART


def run(name: str, options: Options) -> Report:
    """Measure one of ``summaries``.

    Raises:
        CannotMeasure: this host lacks what it needs.
    """
    return under_conditions(lambda: _measure_of(name)(options))


def under_conditions(measure: Callable[[], Report]) -> Report:
    """Measure with kvmd's log silent, and note the conditions in the report."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    conditions = Conditions()
    try:
        report = measure()
    except (FileNotFoundError, subprocess.TimeoutExpired, HostError, MachineSilent, BaseExceptionGroup) as error:
        raise _unwrapped(error) from error
    finally:
        structlog.reset_defaults()
    report.conditions = conditions.as_json()
    return report


def _unwrapped(error: BaseException) -> BaseException:
    """Return what went wrong, as what it is to whoever measures."""
    # Nurseries wrap what ends them, even where it is the only one.
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    match error:
        case FileNotFoundError():
            return CannotMeasure(f"{error.filename} is not here: {error.strerror}")
        case subprocess.TimeoutExpired():
            return CannotMeasure(f"{Path(error.cmd[0]).name} did not end within {error.timeout:.0f} s")
        case HostError() | MachineSilent():
            return CannotMeasure(str(error))
        case _:
            return error


def _measure_of(name: str) -> Callable[[Options], Report]:
    measure: Callable[[Options], Report] = importlib.import_module(f"kvmd.benchmark.{name}").measure
    return measure
