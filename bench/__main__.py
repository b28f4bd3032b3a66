"""``python -m bench [NAME...] [--quick] [--large] [--json FILE]``: measure, and print tables."""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import sys
from pathlib import Path

import structlog

from bench.measure import CannotMeasure, LoadWatch, Options, Report
from bench.tables import as_json, render

BENCHMARKS = {
    "handoff": "a request's way to the conversion service and back, beside a bare ping-pong of two threads",
    "pingpong": "conversions end to end, beside the C floor",
    "software": "conversions and instructions on the software CPU, beside KVM",
    "start": "the start of `kvmd run` to the guest's first output",
    "fleet": "the daemon's machines: from a request to the guest's first output, and memory of idle ones",
    "post": "a machine over the daemon's API: from its POST to the guest's first output, beside QEMU",
    "blocks": "what conversions and a machine's start cost, by block size, memory and pages",
    "large": "explicit conversions of a large range, beside the bare ioctls (in the lab: lab/README.md)",
    "linux": "a Linux guest's start, disk and network, beside QEMU's microvm (in the lab: lab/README.md)",
    "api": "the control API: a small GET beside a bare h11 echo, and streams of events",
    "memory": "host memory that large machines take before the guest touches any",
}
"""Benchmarks with one line each: each is ``measure(options)`` in the module of its name."""


def main() -> int:
    """Measure what the command line names; all where it names nothing."""
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measure kvmd, as ratios of things that take turns in one run.",
        epilog="\n".join(f"{name:10}{what}" for name, what in BENCHMARKS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="which of those below; all by default")
    parser.add_argument("--quick", action="store_true", help="few and short rounds")
    parser.add_argument("--large", action="store_true", help="machines of 1 TiB too: about 10 s and 5 GiB")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every value there too")
    given = parser.parse_args()
    unknown = [name for name in given.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"there is no benchmark {', '.join(unknown)}: there are {', '.join(BENCHMARKS)}")
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    options = Options(quick=given.quick, large=given.large)
    reports = []
    for name in given.names or BENCHMARKS:
        report = _measure(name, options)
        if report is not None:
            print(render(report), flush=True)
            reports.append(as_json(report))
    if given.json is not None:
        given.json.write_text(json.dumps(reports, indent=1) + "\n", encoding="utf-8")
    return 0


def _measure(name: str, options: Options) -> Report | None:
    load = LoadWatch()
    try:
        report: Report = importlib.import_module(f"bench.{name}").measure(options)
    except CannotMeasure as error:
        print(f"bench: {name}: not measured: {error}", file=sys.stderr)
        return None
    report.notes.append(load.note())
    return report


if __name__ == "__main__":
    sys.exit(main())
