"""The daemon's own file, config/kvmd.toml: who may use the API, and where it listens. Checked before anything opens."""

from __future__ import annotations

import grp
from collections.abc import Mapping
from pathlib import Path

import msgspec

from kvmd.errors import ConfigError
from kvmd.toml_file import Keys, read_toml, refuse_unknown, shown

_SOCKET_LIMIT = 107
"""Bytes of a Unix socket's path (unix(7))."""

_CONNECTIONS_LIMIT = 100_000
_DRAIN_LIMIT = 3600.0

_KEYS = Keys(
    {
        "api": "a table: [api], with keys of its own",
        "api.socket": f'an absolute path of at most {_SOCKET_LIMIT} bytes, such as "/run/kvmd/kvmd.sock"',
        "api.operators": 'the name of a group, such as "kvmd", or "" for nobody but root and kvmd itself',
        "api.viewers": 'the name of a group, such as "kvmd-view", or "" for nobody',
        "api.viewers_socket": "an absolute path, other than that of api.socket",
        "api.drain_seconds": f"a number of seconds from 0 to {_DRAIN_LIMIT:g}",
        "api.connections": f"a whole number from 1 to {_CONNECTIONS_LIMIT}",
        "api.connections_per_user": "a whole number from 1 to api.connections",
        "images": "a table: [images], with keys of its own",
        "images.folders": 'a list of absolute paths of folders, such as ["/var/lib/kvmd/images"]',
        "disks": "a table: [disks], with keys of its own",
        "disks.folders": 'a list of absolute paths of folders, such as ["/var/lib/kvmd/disks"]',
        "networks": "a table: [networks], with keys of its own",
        "networks.bridges": 'a list of names of bridges, such as ["br0"]',
        "networks.namespaces": "true or false",
    }
)
"""What would be right, by key: the second half of every message."""


class ApiConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The control API.

    Attributes:
        socket: where it listens.
        operators: the group of those who may do everything, or "".
        viewers: the group of those who may look, or "".
        viewers_socket: where they connect; there is none without ``viewers``.
        drain_seconds: how long a stop waits for requests under way.
        connections: open at once, by all clients.
        connections_per_user: open at once, by one user.
    """

    socket: str = "/run/kvmd/kvmd.sock"
    operators: str = ""
    viewers: str = ""
    viewers_socket: str = "/run/kvmd/view.sock"
    drain_seconds: float = 5.0
    connections: int = 1024
    connections_per_user: int = 256

    def __post_init__(self) -> None:
        _KEYS.need("api.socket", self.socket, _is_socket_path(self.socket))
        two = _is_socket_path(self.viewers_socket) and self.viewers_socket != self.socket
        _KEYS.need("api.viewers_socket", self.viewers_socket, two)
        _KEYS.need("api.drain_seconds", self.drain_seconds, 0 <= self.drain_seconds <= _DRAIN_LIMIT)
        _KEYS.need("api.connections", self.connections, 1 <= self.connections <= _CONNECTIONS_LIMIT)
        each = self.connections_per_user
        _KEYS.need("api.connections_per_user", each, 1 <= each <= self.connections)


class ImagesConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Guests' images, and Linux guests' kernels and initial RAM disks.

    Attributes:
        folders: operators may start the files in them.
    """

    folders: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for folder in self.folders:
            _KEYS.need("images.folders", folder, _is_path(folder))


class DisksConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Linux guests' disks.

    Attributes:
        folders: operators may give the files in them to guests, which write to them.
    """

    folders: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for folder in self.folders:
            _KEYS.need("disks.folders", folder, _is_path(folder))


class NetworksConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Linux guests' networks.

    Attributes:
        bridges: operators may attach guests to these, and have those made that are not there.
        namespaces: operators may give guests a network namespace.
    """

    bridges: tuple[str, ...] = ()
    namespaces: bool = False


class DaemonConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All of the file.

    Raises:
        ConfigError: a value is impossible; the message names the key and what would be right.
    """

    api: ApiConfig = msgspec.field(default_factory=ApiConfig)
    images: ImagesConfig = msgspec.field(default_factory=ImagesConfig)
    disks: DisksConfig = msgspec.field(default_factory=DisksConfig)
    networks: NetworksConfig = msgspec.field(default_factory=NetworksConfig)


def load_daemon_config(path: Path) -> DaemonConfig:
    """Return what the TOML file at ``path`` says.

    Raises:
        ConfigError: the file cannot be read, is not TOML, or cannot be meant; one line with file, key and what would
            be right.
    """
    document = read_toml(path, whose="daemon")
    try:
        return daemon_config_of(document)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def daemon_config_of(document: Mapping[str, object]) -> DaemonConfig:
    """Return what a parsed file says.

    Raises:
        ConfigError: it cannot be meant; one line with key and what would be right.
    """
    refuse_unknown(document, DaemonConfig)
    kinds = (("api", ApiConfig), ("images", ImagesConfig), ("disks", DisksConfig), ("networks", NetworksConfig))
    for name, kind in kinds:
        table = document.get(name, {})
        if isinstance(table, Mapping):
            refuse_unknown(table, kind, f"{name}.")
    try:
        return msgspec.convert(document, DaemonConfig)
    except msgspec.ValidationError as error:
        raise _KEYS.refused(error, document) from error


def group_id(key: str, name: str) -> int | None:
    """Return the number of the group that ``key`` names, or None for "".

    Raises:
        ConfigError: there is none of that name.
    """
    if not name:
        return None
    try:
        return grp.getgrnam(name).gr_gid
    except (KeyError, ValueError) as error:  # ValueError: a zero byte in it
        raise ConfigError(
            f"{key}: there is no group {shown(name)} on this host: make it (groupadd --system), or leave the key out"
        ) from error


def _is_path(text: str) -> bool:
    return text.startswith("/") and "\0" not in text


def _is_socket_path(text: str) -> bool:
    return _is_path(text) and not text.endswith("/") and len(text.encode(errors="surrogateescape")) <= _SOCKET_LIMIT
