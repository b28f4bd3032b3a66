"""``kvmd check``: what this host can do, and what it cannot."""

from __future__ import annotations

import json

import click

from kvmd.cli.host_report import as_json, as_text, networks_json, report_of, without_kvm_json, without_kvm_text
from kvmd.errors import HostError
from kvmd.kvm.capabilities import probe
from kvmd.kvm.system import Kvm
from kvmd.network.availability import missing_for_bridges, missing_for_namespaces
from kvmd.software.availability import missing_emulator
from kvmd.stop import ExitStatus


@click.command(epilog=f"Exit status: 0 where kvmd can run guests, {ExitStatus.HOST:d} where it cannot.")
@click.option("--json", "wants_json", is_flag=True, help="Write one JSON object.")
def check(*, wants_json: bool) -> int:
    """Say what this host can do, which capabilities it lacks, and what each of those costs."""
    software = missing_emulator()
    networks = _networks()
    try:
        with Kvm.open() as kvm:
            report = report_of(probe(kvm))
    except HostError as error:
        problem = str(error)
        usable = software is None
        print(
            json.dumps(without_kvm_json(problem, software) | networks_json(networks), indent=2)
            if wants_json
            else without_kvm_text(problem, software)
        )
    else:
        usable = report.usable or software is None
        print(
            json.dumps(as_json(report, software) | networks_json(networks), indent=2)
            if wants_json
            else as_text(report, software, networks)
        )
    return 0 if usable else ExitStatus.HOST


def host_facts() -> dict[str, object]:
    """Return what ``kvmd check --json`` says."""
    software = missing_emulator()
    try:
        with Kvm.open() as kvm:
            return as_json(report_of(probe(kvm)), software) | networks_json(_networks())
    except HostError as error:
        return without_kvm_json(str(error), software)


def _networks() -> dict[str, str | None]:
    return {"bridges": missing_for_bridges(), "namespaces": missing_for_namespaces()}
