"""Taking the daemon's answers apart, without believing them: what is not as docs/api.md says is not kvmd's."""

from __future__ import annotations

from typing import Any

from kvmd.ctl.errors import NotKvmd
from kvmd.ctl.statuses import Status
from kvmd.ctl.text import shown

_STATUS_LIMIT = 255


def objects(answer: object, key: str) -> list[dict[str, Any]]:
    """Return the list of objects that an answer has under ``key``.

    Raises:
        NotKvmd: it has none.
    """
    match answer:
        case {**members} if isinstance(found := members.get(key), list):
            if all(isinstance(each, dict) for each in found):
                return found
    raise NotKvmd(f"what answers on the socket is not kvmd: its answer has no {key}")


def an_object(answer: object, key: str | None = None) -> dict[str, Any]:
    """Return an answer, or what it has under ``key``, which is an object.

    Raises:
        NotKvmd: it is none.
    """
    found = answer.get(key) if key is not None and isinstance(answer, dict) else answer
    if isinstance(found, dict):
        return found
    raise NotKvmd(f"what answers on the socket is not kvmd: its answer has no {key or 'members'}")


def text(answer: dict[str, Any], key: str) -> str:
    """Return a text of an answer.

    Raises:
        NotKvmd: there is none.
    """
    found = answer.get(key)
    if isinstance(found, str):
        return found
    raise NotKvmd(f"what answers on the socket is not kvmd: its answer has no {key}")


def number(answer: dict[str, Any], key: str) -> int:
    """Return a whole number of an answer.

    Raises:
        NotKvmd: there is none.
    """
    found = answer.get(key)
    if isinstance(found, int) and not isinstance(found, bool):
        return found
    raise NotKvmd(f"what answers on the socket is not kvmd: its answer has no {key}")


def exit_status(machine: dict[str, Any]) -> int:
    """Return the exit status of a machine that has ended."""
    match machine.get("end"):
        case {"status": int(status)} if 0 <= status <= _STATUS_LIMIT:
            return status
        case _:
            return Status.INTERNAL


def how_it_ended(machine: dict[str, Any]) -> str:
    """Return one line on a machine's end, or its state where it has none."""
    match machine.get("end"):
        case {"reason": reason, "status": status, **more}:
            signal = more.get("signal")
            by = f", signal {shown(signal)}" if signal is not None else ""
            message = more.get("message")
            return f"{shown(reason)}, status {shown(status)}{by}" + (f": {shown(message)}" if message else "")
        case _:
            return shown(machine.get("state", "unknown"))
