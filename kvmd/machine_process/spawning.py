"""What the daemon and the parent of machines say to each other, and a new machine to whoever asked for it."""

from __future__ import annotations

from typing import Any

import msgspec

from kvmd.spec.disks import DISKS_LIMIT

PACKET_LIMIT = 4096
"""Bytes of one message, at most."""

DESCRIPTORS_LIMIT = 3 + 2 + DISKS_LIMIT
"""Folder, socket and pipe; an image, or kernel and initrd; disks."""


class Spawn(msgspec.Struct, frozen=True, tag="spawn"):
    """Make a machine's process. ``number`` comes back in the answer."""

    number: int


class Spawned(msgspec.Struct, frozen=True, tag="spawned"):
    """It was forked, or not: then ``problem`` says why."""

    number: int
    pid: int
    problem: str = ""


class Reaped(msgspec.Struct, frozen=True, tag="reaped"):
    """A child ended: ``status`` or ``signal`` is None."""

    pid: int
    status: int | None
    signal: int | None


class Waiting(msgspec.Struct, frozen=True, tag="waiting"):
    """What a process that waits for a machine says first: which kvmd it is."""

    version: str


class Become(msgspec.Struct, frozen=True, tag="become"):
    """The answer to ``Waiting``: be this machine, in the unit of that name."""

    unit: str
    name: str


class Birth(msgspec.Struct, frozen=True):
    """What a new process tells whoever asked for it, once.

    Attributes:
        pid: of the process.
        start_ticks: when that started: field 22 of /proc/pid/stat.
        facts: of the machine.
        problem: None, or why there is no machine; the process ends.
        kind: of a problem: ``config``, ``image``, ``host`` or ``other``.
    """

    pid: int
    start_ticks: int
    facts: dict[str, Any] = {}
    problem: str | None = None
    kind: str = ""
