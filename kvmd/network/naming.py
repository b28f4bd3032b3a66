"""How taps, namespaces and addresses are named, and by what kvmd knows its own again. Nothing here does I/O."""

from __future__ import annotations

import base64
import hashlib

INTERFACE_BYTES = 15
"""The longest name of an interface: IFNAMSIZ less its end, linux/if.h."""

GROUP = int.from_bytes(b"kvmd")
"""The group (IFLA_GROUP) of every interface that kvmd makes, and of ``lo`` in namespaces that it makes.

It is set in the same message that makes a bridge, so that there is no moment at which kvmd's death would leave
one that nobody knows; ``ip link show group 1802923364`` lists all."""

LOCK = "kvmd+lock"
"""The tap that whoever changes what machines share holds: see ``kvmd.network.tap.changing``."""

NAMESPACE_PREFIX = "kvmd-"

_PREFIX = "kvmd-"
_HASH_CHARACTERS = 6
_TRIES = 8


def tap_names(machine: str, index: int) -> list[str]:
    """Return the names that a machine's tap may have, the best first.

    The first is ``kvmd-MACHINE`` where that fits and ``kvmd-MAC+HASH`` else. A machine's name has no ``+``, so the two
    kinds never meet; the others are for where somebody has the first.

    Args:
        machine: the machine's name.
        index: which of its networks, from 0.
    """
    plain = _PREFIX + machine
    names = [plain] if index == 0 and len(plain) <= INTERFACE_BYTES else []
    kept = machine[: INTERFACE_BYTES - len(_PREFIX) - 1 - _HASH_CHARACTERS]
    for salt in range(_TRIES - len(names)):
        digest = hashlib.sha256(f"tap {machine} {index} {salt}".encode()).digest()
        names.append(f"{_PREFIX}{kept}+{base64.b32encode(digest).decode().lower()[:_HASH_CHARACTERS]}")
    return names


def guest_mac(machine: str, index: int) -> str:
    """Return the address of a guest's interface, the same each time: locally administered, unicast."""
    return _mac(f"guest {machine} {index}")


def alias(machine: str, mac: str = "") -> str:
    """Return what an interface says of itself: whose it is, and of a tap the address of the guest behind it.

    No machine's name has a space, so that the address is known by it.
    """
    return f"kvmd: {machine}" + (f" {mac}" if mac else "")


def bridge_mac(bridge: str) -> str:
    """Return the address of a bridge that kvmd makes.

    Without one of its own a bridge has the lowest of its ports', which changes as guests come and go.
    """
    return _mac(f"bridge {bridge}")


def tap_mac(tap: str) -> str:
    """Return the address of the host's end of a tap.

    As high as can be, so that a bridge of somebody else's, which takes the lowest of its ports', keeps its own.
    """
    return "fe" + _mac(f"tap {tap}")[2:]


def namespace_name(machine: str, index: int) -> str:
    """Return the name of a guest's network namespace; no two machines of one daemon share one."""
    return f"{NAMESPACE_PREFIX}{machine}" + (f"+{index}" if index else "")


def _mac(of: str) -> str:
    octets = bytearray(hashlib.sha256(f"kvmd {of}".encode()).digest()[:6])
    octets[0] = octets[0] & ~1 | 2
    return ":".join(f"{octet:02x}" for octet in octets)
