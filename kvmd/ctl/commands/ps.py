"""``kvmctl ps``: the machines."""

from __future__ import annotations

from typing import Any

import click

from kvmd.ctl.answers import objects
from kvmd.ctl.session import Session, ctl_command
from kvmd.ctl.text import age, columns, shown, size

_HEADING = ("NAME", "STATE", "IMAGE", "VCPUS", "MEMORY", "PROTECTION", "PID", "AGE", "END")


@ctl_command("ps")
@click.option(
    "--state",
    "states",
    multiple=True,
    type=click.Choice(["created", "running", "paused", "stopped"]),
    help="Only machines in this state; repeat it for more.",
)
@click.option("-q", "--quiet", is_flag=True, help="Only the names.")
def ps_command(session: Session, *, states: tuple[str, ...], quiet: bool) -> None:
    """List the machines."""
    machines = objects(session.client().get("/v1/machines"), "machines")
    found = [machine for machine in machines if not states or machine.get("state") in states]
    if quiet:
        names = [str(machine.get("name")) for machine in found]
        session.answer(names, "\n".join(map(shown, names)) if names else None)
        return
    rows = [_row(machine) for machine in found]
    session.answer({"machines": found}, columns(_HEADING, rows, right=frozenset({3, 4, 6, 7})))


def _row(machine: dict[str, Any]) -> list[object]:
    spec = machine["spec"] if isinstance(machine.get("spec"), dict) else {}
    end = machine["end"] if isinstance(machine.get("end"), dict) else None
    return [
        machine.get("name", "-"),
        machine.get("state", "-"),
        spec.get("image", "-"),
        spec.get("vcpus", "-"),
        size(spec.get("memory", "-")),
        spec.get("protection", "-"),
        "-" if machine.get("pid") is None else machine["pid"],
        age(machine.get("started") or machine.get("created")),
        "-" if end is None else f"{end.get('reason')} ({end.get('status')})",
    ]
