"""The disks of a Linux guest: tables ``[[disks]]`` of the machine's file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from kvmd.errors import ConfigError
from kvmd.toml_file import Keys, refuse_unknown, shown

DISKS_LIMIT = 8

DISKS_EXPECTED = f"up to {DISKS_LIMIT} tables, [[disks]], with keys of their own"
"""What would be right for all of them."""

_KEYS = Keys(
    {
        "path": "the path of a raw disk image, relative to this file",
        "read_only": "true or false",
        "direct": "true or false",
    }
)
"""What would be right, by key of one: the second half of every message."""


class DiskSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One disk of a Linux guest: /dev/vda, /dev/vdb, ... in their order.

    Attributes:
        path: a raw image: an ordinary file, or a block device.
        read_only: the guest cannot write to it; then other machines may read it, too.
        direct: past the host's page cache (O_DIRECT).
    """

    path: Path
    read_only: bool = False
    direct: bool = False


def disks_of(tables: object, *, base: Path) -> tuple[DiskSpec, ...]:
    """Return the disks that the parsed tables ``[[disks]]`` describe, in their order.

    Args:
        tables: what ``tomllib`` made of them.
        base: the folder that a relative path starts at.

    Raises:
        ConfigError: they describe none; one line with ``disks[NUMBER].KEY`` and what would be right.
    """
    if not isinstance(tables, list) or len(tables) > DISKS_LIMIT:
        raise ConfigError(f"disks: {shown(tables)} is not possible: expected {DISKS_EXPECTED}")
    return tuple(_disk_of(table, f"disks[{index}]", base) for index, table in enumerate(tables))


def _disk_of(table: object, where: str, base: Path) -> DiskSpec:
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where}: {shown(table)} is not possible: expected a table, [[disks]]")
    refuse_unknown(table, DiskSpec, f"{where}.")
    path = table.get("path")
    if not isinstance(path, str) or not path or "\0" in path:
        problem = "is missing" if path is None else f"{shown(path)} is not possible"
        raise ConfigError(f"{where}.path: {problem}: expected {_KEYS['path']}")
    try:
        return msgspec.convert({**table, "path": base / path}, DiskSpec)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}.{_KEYS.refused(error, table)}") from error
