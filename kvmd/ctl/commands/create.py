"""``kvmctl create``: a machine that does not run yet."""

from __future__ import annotations

from kvmd.ctl.request import create, machine_description, wanted
from kvmd.ctl.session import Session, ctl_command
from kvmd.ctl.text import shown


@ctl_command("create")
@machine_description
def create_command(session: Session, *, target: str, **overrides: object) -> None:
    """Create a machine; it does not run yet. Prints its name.

    It is described by a TOML file (see config/), or is an ELF file, or one of those that kvmd brings along, such as
    builtin:hello; options override the file. An image is opened with your rights, and passed to kvmd.
    """
    machine = create(session.client(), wanted(target, overrides))
    session.answer(machine, shown(machine["name"]))
