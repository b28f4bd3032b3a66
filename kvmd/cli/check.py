"""``kvmd check``: what this host can do, and what it cannot."""

from __future__ import annotations

import json

import click

from kvmd.cli.host_report import as_json, as_text, report_of
from kvmd.errors import HostError
from kvmd.kvm.capabilities import probe
from kvmd.kvm.system import Kvm
from kvmd.stop import ExitStatus


@click.command(epilog=f"Exit status: 0 where kvmd can run guests, {ExitStatus.HOST:d} where it cannot.")
@click.option("--json", "wants_json", is_flag=True, help="Write one JSON object.")
def check(*, wants_json: bool) -> int:
    """Say what this host can do, which capabilities it lacks, and what each of those costs."""
    try:
        with Kvm.open() as kvm:
            report = report_of(probe(kvm))
    except HostError as error:
        if not wants_json:
            raise
        print(json.dumps({"usable": False, "problem": str(error)}))
        return ExitStatus.HOST
    print(json.dumps(as_json(report), indent=2) if wants_json else as_text(report))
    return 0 if report.usable else ExitStatus.HOST
