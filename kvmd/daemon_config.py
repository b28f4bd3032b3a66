"""The daemon's own file, config/kvmd.toml: who may use the API, and where it listens. Checked before anything opens."""

from __future__ import annotations

import grp
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

from kvmd.errors import ConfigError
from kvmd.toml_file import Keys, read_toml, refuse_unknown, shown

_SOCKET_LIMIT = 107
"""Bytes of a Unix socket's path (unix(7))."""

_CONNECTIONS_LIMIT = 100_000
_DRAIN_LIMIT = 3600.0
_WAITING_LIMIT = 1000

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
        "machines": "a table: [machines], with keys of its own",
        "machines.units": '"auto", "always" or "never"',
        "machines.waiting": f"a whole number from 0 to {_WAITING_LIMIT}",
        "machines.socket": f"an absolute path of at most {_SOCKET_LIMIT} bytes, other than those of [api]",
        "log": "a table: [log], with keys of its own",
        "log.level": '"debug", "info", "warning" or "error"',
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


class MachinesConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Machines' processes.

    Attributes:
        units: whether each is a systemd unit of its own: ``auto`` where the daemon itself is in kvmd.slice.
        waiting: such processes that are kept waiting for a machine.
        socket: where they wait.
    """

    units: Literal["auto", "always", "never"] = "auto"
    waiting: int = 2
    socket: str = "/run/kvmd/machines.sock"

    def __post_init__(self) -> None:
        _KEYS.need("machines.units", self.units, self.units in {"auto", "always", "never"})
        _KEYS.need("machines.waiting", self.waiting, 0 <= self.waiting <= _WAITING_LIMIT)
        _KEYS.need("machines.socket", self.socket, _is_socket_path(self.socket))


class LogConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The daemon's log.

    Attributes:
        level: the lowest that is shown.
    """

    level: Literal["debug", "info", "warning", "error"] = "info"

    def __post_init__(self) -> None:
        _KEYS.need("log.level", self.level, self.level in {"debug", "info", "warning", "error"})


class DaemonConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All of the file.

    Raises:
        ConfigError: a value is impossible; the message names the key and what would be right.
    """

    api: ApiConfig = msgspec.field(default_factory=ApiConfig)
    images: ImagesConfig = msgspec.field(default_factory=ImagesConfig)
    disks: DisksConfig = msgspec.field(default_factory=DisksConfig)
    networks: NetworksConfig = msgspec.field(default_factory=NetworksConfig)
    machines: MachinesConfig = msgspec.field(default_factory=MachinesConfig)
    log: LogConfig = msgspec.field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        other = self.machines.socket not in {self.api.socket, self.api.viewers_socket}
        _KEYS.need("machines.socket", self.machines.socket, other)


_TABLES: dict[str, type[msgspec.Struct]] = {
    "api": ApiConfig,
    "images": ImagesConfig,
    "disks": DisksConfig,
    "networks": NetworksConfig,
    "machines": MachinesConfig,
    "log": LogConfig,
}

_AT_START = (
    "api.socket",
    "api.viewers_socket",
    "machines.units",
    "machines.socket",
)
"""Keys that a running daemon does not read again: they say what it opened when it started."""


def need_restart(old: DaemonConfig, new: DaemonConfig) -> list[str]:
    """Return the keys in which ``new`` differs, and that only a restart of the daemon brings into force."""

    def value(config: DaemonConfig, key: str) -> object:
        table, _, name = key.partition(".")
        return getattr(getattr(config, table), name)

    return [key for key in _AT_START if value(old, key) != value(new, key)]


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
    for name, kind in _TABLES.items():
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
