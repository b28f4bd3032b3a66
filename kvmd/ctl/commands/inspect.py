"""``kvmctl inspect``: all that is known of a machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kvmd.ctl.acting import explained
from kvmd.ctl.answers import an_object
from kvmd.ctl.client import machine_target
from kvmd.ctl.errors import Refused
from kvmd.ctl.session import Session, ctl_command, machine_argument
from kvmd.ctl.text import cut, shown, size

_DEPTH_LIMIT = 8
_VALUE_LIMIT = 400
_BYTES = {"memory", "chunk", "shared_bytes", "private_bytes"}


@ctl_command("inspect")
@machine_argument(many=True)
def inspect_command(session: Session, *, names: tuple[str, ...]) -> None:
    """Show all that is known of machines: what they are made of, their state, and what they did so far."""
    client = session.client()
    found = []
    for name in dict.fromkeys(names):
        try:
            machine = an_object(client.get(machine_target(name)))
            machine["counters"] = an_object(client.get(machine_target(name, "counters")))
        except Refused as error:
            raise explained(client, error, name, "inspect") from error
        found.append(machine)
    session.answer(found, "\n\n".join("\n".join(_lines(machine)) for machine in found))


def _lines(table: dict[str, Any], depth: int = 0) -> Iterator[str]:
    indent = "  " * depth
    width = max((len(shown(key)) for key in table), default=0)
    for key, value in table.items():
        label = f"{indent}{shown(key):{width}}"
        match value:
            case {} if value and depth < _DEPTH_LIMIT:
                yield label.rstrip()
                yield from _lines(value, depth + 1)
            case [{}, *_] if depth < _DEPTH_LIMIT:
                yield label.rstrip()
                for each in value:
                    members = each.items() if isinstance(each, dict) else [("", each)]
                    yield f"{indent}  " + cut(" ".join(f"{shown(k)}={shown(v)}" for k, v in members), _VALUE_LIMIT)
            case None:
                yield f"{label}  -"
            case _:
                text = size(value) if key in _BYTES else _plain(value)
                yield f"{label}  {cut(text, _VALUE_LIMIT)}"


def _plain(value: object) -> str:
    """Return a value as people write it."""
    match value:
        case bool():
            return "yes" if value else "no"
        case [*values]:
            return ", ".join(map(shown, values)) or "-"
        case _:
            return shown(value) or "-"
