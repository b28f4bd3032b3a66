"""The journal's own protocol: each event as fields (https://systemd.io/JOURNAL_NATIVE_PROTOCOL).

One datagram an event, to journald's socket. ``KVMD_MACHINE=`` and ``KVMD_VCPU=`` are what people look for
(``journalctl KVMD_MACHINE=web``); every other key of an event becomes a field of the same kind.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Mapping
from typing import Any

from kvmd.closing import Closing

SOCKET = "/run/systemd/journal/socket"

_PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
"""syslog(3)."""

_NOT_IN_NAMES = re.compile(r"[^A-Z0-9_]")
_NAME_LIMIT = 64 - len("KVMD_")
_VALUE_LIMIT = 16 << 10
"""Bytes of one field: a datagram has some 200 KiB, and the rest of a traceback is in the machine's own log."""

_NO_FIELDS = frozenset({"timestamp", "level", "event", "exception"})


class Journal(Closing):
    """Sends events to journald; never waits for it.

    Args:
        path: journald's socket.

    Attributes:
        lost: events that it did not take.
    """

    def __init__(self, path: str = SOCKET) -> None:
        self.lost = 0
        self._path = path
        # Not connected: a journald that restarts has another socket at the same path.
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)

    def send(self, event: Mapping[str, Any]) -> bool:
        """Send one event; tell whether journald took it."""
        try:
            self._socket.sendto(entry_of(event), self._path)
        except OSError:
            self.lost += 1
            return False
        return True

    def close(self) -> None:
        """Close it; harmless the second time."""
        self._socket.close()


def is_stderr(environment: Mapping[str, str]) -> bool:
    """Tell whether standard error goes to the journal (systemd.exec(5), JOURNAL_STREAM)."""
    try:
        about = os.fstat(2)
    except OSError:
        return False
    return environment.get("JOURNAL_STREAM") == f"{about.st_dev}:{about.st_ino}"


def entry_of(event: Mapping[str, Any]) -> bytes:
    """Return an event as the journal's protocol has it.

    ``MESSAGE`` is the event's name with its fields, for who reads; then each field for who searches.
    """
    name, level = str(event.get("event", "")), str(event.get("level", "info"))
    fields = {key: _text(value) for key, value in event.items() if key not in _NO_FIELDS and value is not None}
    words = [name, *(f"{key}={_quoted(value)}" for key, value in fields.items())]
    message = " ".join(words)
    if event.get("exception"):
        message += f"\n{event['exception']}"
    entry = _field("MESSAGE", message) + _field("PRIORITY", str(_PRIORITIES.get(level, 6)))
    entry += _field("SYSLOG_IDENTIFIER", "kvmd") + _field("KVMD_EVENT", name)
    for key, value in fields.items():
        entry += _field("KVMD_" + _NOT_IN_NAMES.sub("_", key.upper())[:_NAME_LIMIT], value)
    return entry


def _field(name: str, value: str) -> bytes:
    data = value.encode(errors="backslashreplace")[:_VALUE_LIMIT]
    if b"\n" in data:
        return name.encode() + b"\n" + len(data).to_bytes(8, "little") + data + b"\n"
    return name.encode() + b"=" + data + b"\n"


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, default=repr)
    except ValueError:
        return repr(value)


def _quoted(value: str) -> str:
    return json.dumps(value) if not value or not value.isprintable() or " " in value else value
