"""``kvmctl rm``: machines forgotten."""

from __future__ import annotations

from typing import Any

import click

from kvmd.ctl.acting import for_each
from kvmd.ctl.client import Client, machine_target
from kvmd.ctl.errors import Refused
from kvmd.ctl.session import Session, ctl_command, machine_argument


@ctl_command("rm")
@machine_argument(many=True)
@click.option("-f", "--force", is_flag=True, help="End a machine first that runs; one that is not there is as good.")
def rm_command(session: Session, *, names: tuple[str, ...], force: bool) -> int:
    """Forget machines that do not run: their logs and figures too."""

    def remove(client: Client, name: str) -> tuple[dict[str, Any], bool]:
        gone: dict[str, Any] = {"name": name, "state": "deleted"}
        try:
            try:
                client.delete(machine_target(name))
            except Refused as error:
                if not force or error.kind != "wrong-state":
                    raise
                _kill(client, name)
                client.delete(machine_target(name))
        except Refused as error:
            if not force or error.kind != "unknown-machine":
                raise
        return gone, True

    return for_each(session, names, "rm", remove)


def _kill(client: Client, name: str) -> None:
    try:
        client.post(machine_target(name, "kill"))
    except Refused as error:
        # It ended meanwhile.
        if error.kind != "wrong-state":
            raise
