"""What a guest's network is, as the operator writes it: a table ``[[networks]]`` of the machine's file."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from kvmd.errors import ConfigError
from kvmd.network.naming import LOCK
from kvmd.toml_file import Keys, refuse_unknown, shown

NETWORKS_LIMIT = 8
"""Networks of one machine."""

MTU_DEFAULT = 1500
MTU_LEAST, MTU_MOST = 68, 65521
"""Bytes: what Linux's tun driver allows, drivers/net/tun.c (MIN_MTU, and ETH_MAX_MTU less an Ethernet header)."""

ADDRESSES_LIMIT = 16

_INTERFACE = re.compile(r"[A-Za-z0-9_.+@=~-]{1,15}", re.ASCII)
_NO_INTERFACE = frozenset({".", "..", "all", "default", LOCK})
"""Names that the kernel, or /proc/sys/net, takes for something else; and the lock, which a guest would keep."""

_MAC = re.compile(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}", re.ASCII)
_KINDS = frozenset({"bridge", "made-bridge", "namespace"})

_KEYS = Keys(
    {
        "kind": '"bridge", "made-bridge" or "namespace"',
        "bridge": 'the name of an interface, up to 15 letters, digits and "_.+@=~-", such as "br0"',
        "tap": 'the name of an interface that is not there yet, up to 15 letters, digits and "_.+@=~-", such as "web0"',
        "mac": 'the guest\'s address, six bytes of which the first is even, such as "52:54:00:12:34:56"',
        "mtu": f"bytes, a whole number from {MTU_LEAST} to {MTU_MOST}",
        "addresses": f'up to {ADDRESSES_LIMIT} addresses of the host, each with its prefix, such as ["10.9.0.1/24"]',
        "isolated": "true or false",
    }
)
"""What would be right, by key: the second half of every message."""


class NetworkSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One network of a guest: a tap, and what it is attached to.

    Attributes:
        kind: ``bridge`` (one that is there), ``made-bridge`` (kvmd makes it with the first machine that wants it, and
            removes it with the last) or ``namespace`` (a network namespace of this guest's own, with the tap in it).
        bridge: the bridge's name; of the first two kinds.
        tap: the tap's name; by default made of the machine's.
        mac: the guest's address; by default made of the machine's name.
        mtu: bytes of the largest packet, Ethernet's header not counted; by default the bridge's, or 1500.
        addresses: the host's, as ``10.9.0.1/24``: on the made bridge, or on the tap in the namespace.
        isolated: the guest cannot talk to other isolated ports of the bridge, only to the rest of it.

    Raises:
        ConfigError: a value is impossible; the message names the key and what would be right.
    """

    kind: Literal["bridge", "made-bridge", "namespace"] = "bridge"
    bridge: str = ""
    tap: str = ""
    mac: str = ""
    mtu: int | None = None
    addresses: tuple[str, ...] = ()
    isolated: bool = False

    def __post_init__(self) -> None:
        # The type says so too, but a spec that a program makes has not been through msgspec.
        _KEYS.need("kind", self.kind, self.kind in _KINDS)
        if self.kind == "namespace":
            if self.bridge or self.isolated:
                key = "bridge" if self.bridge else "isolated"
                raise ConfigError(f'{key}: a guest in a namespace of its own has no bridge: expected kind = "bridge"')
        elif not self.bridge:
            raise ConfigError(f"bridge is missing: expected {_KEYS['bridge']}")
        else:
            _KEYS.need("bridge", self.bridge, _is_interface(self.bridge))
        _KEYS.need("tap", self.tap, not self.tap or _is_interface(self.tap))
        if self.tap and self.tap == self.bridge:
            raise ConfigError(f"tap: {shown(self.tap)} is the bridge's name: expected {_KEYS['tap']}")
        if self.mac:
            _KEYS.need("mac", self.mac, _is_unicast(self.mac))
            msgspec.structs.force_setattr(self, "mac", self.mac.lower())
        if self.mtu is not None:
            _KEYS.need("mtu", self.mtu, MTU_LEAST <= self.mtu <= MTU_MOST)
        _KEYS.need("addresses", list(self.addresses), len(self.addresses) <= ADDRESSES_LIMIT)
        if self.addresses and self.kind == "bridge":
            raise ConfigError(
                f'addresses: bridge {self.bridge} is not kvmd\'s to configure: expected kind = "made-bridge", or none'
            )
        normal = tuple(_normal_address(text) for text in self.addresses)
        if len(set(normal)) < len(normal):
            raise ConfigError(f"addresses: {shown(list(self.addresses))} says one twice: expected {_KEYS['addresses']}")
        msgspec.structs.force_setattr(self, "addresses", normal)


def networks_of(tables: object) -> tuple[NetworkSpec, ...]:
    """Return the networks that the parsed tables ``[[networks]]`` describe, in their order.

    Args:
        tables: what ``tomllib`` made of them.

    Raises:
        ConfigError: they describe none; one line with ``networks[NUMBER].KEY`` and what would be right.
    """
    if not isinstance(tables, Sequence) or isinstance(tables, str) or len(tables) > NETWORKS_LIMIT:
        raise ConfigError(f"networks: {shown(tables)} is not possible: expected up to {NETWORKS_LIMIT} [[networks]]")
    networks = tuple(_network_of(table, f"networks[{index}]") for index, table in enumerate(tables))
    for key in ("tap", "mac"):
        given = [value for network in networks if (value := getattr(network, key))]
        for index, network in enumerate(networks):
            if given.count(value := getattr(network, key)) > 1:
                raise ConfigError(f"networks[{index}].{key}: {shown(value)} is there twice: expected one for each")
    return networks


def _network_of(table: object, where: str) -> NetworkSpec:
    if isinstance(table, NetworkSpec):
        return table
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where}: {shown(table)} is not possible: expected a table, [[networks]]")
    refuse_unknown(table, NetworkSpec, f"{where}.")
    try:
        return msgspec.convert(table, NetworkSpec)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}.{_KEYS.refused(error, table)}") from error
    except ConfigError as error:
        raise ConfigError(f"{where}.{error}") from error


def _is_interface(name: str) -> bool:
    return _INTERFACE.fullmatch(name) is not None and name not in _NO_INTERFACE


def _is_unicast(mac: str) -> bool:
    return _MAC.fullmatch(mac) is not None and not int(mac[:2], 16) & 1 and mac.strip("0:") != ""


def _normal_address(text: str) -> str:
    """Return an address with its prefix in its one normal form."""
    try:
        address = ipaddress.ip_interface(text)
    except ValueError:
        address = None
    if (
        address is None
        or "/" not in text
        or address.ip.is_multicast
        or address.ip.is_unspecified
        or address.ip.is_loopback
        # The network itself, unless it is so small that it has no address of its own (RFC 3021, RFC 6164).
        or (address.ip == address.network.network_address and address.network.num_addresses > 2)  # noqa: PLR2004 - as said
    ):
        raise ConfigError(f"addresses: {shown(text)} is not possible: expected {_KEYS['addresses']}")
    return str(address)
