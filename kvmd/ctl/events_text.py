"""Events as lines for people."""

from __future__ import annotations

from typing import Any

from kvmd.ctl.sse import Event
from kvmd.ctl.text import clock, shown, size

_LIFECYCLE_KEYS = ("change", "state", "time", "machine", "reason", "status", "signal", "message")


def document(event: Event) -> dict[str, object]:
    """Return an event for programs: what it says, with its kind and place."""
    return {"event": event.kind, "id": event.id, **event.data}


def line(event: Event) -> str:
    """Return an event for people."""
    data = event.data
    match event.kind:
        case "conversion":
            return conversion_line(data)
        case "lost":
            return loss_line(data)
        case "lifecycle":
            return _lifecycle(data)
        case "counters":
            return _counters(data)
        case _:
            return f"{_machine(data)}  {shown(event.kind)}  {_rest(data, ('machine',))}"


def conversion_line(record: dict[str, Any]) -> str:
    """Return a conversion for people: the words of the daemon's own log."""
    waits = "+".join(_microseconds(record.get(key)) for key in ("waiting_us", "applying_us", "discarding_us"))
    return (
        f"{clock(record.get('time', '-'))}  {_machine(record)}  conversion {shown(record.get('sequence', '?'))}: "
        f"vcpu {shown(record.get('vcpu'))} {shown(record.get('cause'))} {shown(record.get('gpa'))} "
        f"{size(record.get('size'))} {shown(record.get('from') or 'mixed')} -> {shown(record.get('to'))} "
        f"{shown(record.get('outcome'))}  {waits} us"
    )


def loss_line(data: dict[str, Any]) -> str:
    """Return what is said where events are missing."""
    lost = data.get("lost")
    many = "some events" if not isinstance(lost, int) else "1 event" if lost == 1 else f"{lost:,} events"
    return f"-- {many} lost here --"


def _lifecycle(data: dict[str, Any]) -> str:
    words = [shown(data.get("change", "changed"))]
    if data.get("reason") is not None:
        words.append(f"({shown(data['reason'])}, status {shown(data.get('status'))})")
    if data.get("signal") is not None:
        words.append(f"by signal {shown(data['signal'])}")
    if data.get("message"):
        words.append(f"{shown(data['message'])}")
    more = _rest(data, _LIFECYCLE_KEYS)
    when = f"{clock(data['time'])}  " if "time" in data else ""
    return f"{when}{_machine(data)}  {' '.join(words)}" + (f"  {more}" if more else "")


def _counters(data: dict[str, Any]) -> str:
    requests = data.get("requests")
    total = sum(
        each["count"]
        for each in (requests if isinstance(requests, list) else [])
        if isinstance(each, dict) and isinstance(each.get("count"), int)
    )
    return (
        f"{_machine(data)}  {total:,} requests, shared {size(data.get('shared_bytes', '?'))}, "
        f"private {size(data.get('private_bytes', '?'))}"
    )


def _machine(data: dict[str, Any]) -> str:
    return shown(data.get("machine", "-"))


def _rest(data: dict[str, Any], known: tuple[str, ...]) -> str:
    return " ".join(f"{shown(key)}={shown(value)}" for key, value in data.items() if key not in known)


def _microseconds(value: object) -> str:
    return f"{value:.0f}" if isinstance(value, int | float) else "?"
