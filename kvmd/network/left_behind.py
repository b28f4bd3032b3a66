"""What a kvmd that died left in the host's network: found by its marks, and removed.

Only two things outlive a process: bridges that kvmd made, and namespaces that it made. Whether they are left behind is
read from what is there, not from any file: a made bridge without ports and a made namespace without a tap serve nobody,
whichever daemon they were of.
"""

from __future__ import annotations

import socket
from functools import partial
from pathlib import Path

from kvmd.errors import HostError
from kvmd.network import namespace
from kvmd.network.links import Link, Links
from kvmd.network.naming import GROUP
from kvmd.network.own_thread import in_own_thread
from kvmd.network.tap import changing

_CLASS = Path("/sys/class/net")


def is_anything_ours() -> bool:
    """Whether there is anything that kvmd made, in use or not: cheap, and needs no permission."""
    if namespace.ours_perhaps():
        return True
    for name in _interfaces():
        try:
            if int((_CLASS / name / "netdev_group").read_text()) == GROUP:
                return True
        except (OSError, ValueError):
            continue
    return False


def _interfaces() -> list[str]:
    try:
        return [name for _, name in socket.if_nameindex()]
    except OSError:
        # A unit that only AF_UNIX is left to, as kvmd.service without its drop-in: nothing of ours could be made there.
        return []


def remove_left_behind() -> list[str]:
    """Remove what nobody uses any more, and return a line for each; for the daemon's start, from any thread.

    Raises:
        HostError: there is something, and it cannot be removed.
    """
    if not is_anything_ours():
        return []
    return in_own_thread(_remove)


def _remove() -> list[str]:
    with changing():
        removed = []
        with Links() as links:
            found = links.all()
            for link in found:
                if is_unused_bridge(link, found):
                    links.remove(link)
                    removed.append(f"bridge {link.name}")
        for name in namespace.ours_perhaps():
            if in_own_thread(partial(is_unused_namespace, name)):
                namespace.remove(name)
                removed.append(f"network namespace {name}")
    return removed


def is_unused_bridge(link: Link, among: list[Link]) -> bool:
    """Whether a link is a bridge of kvmd's that has no port; while the lock is held nobody is about to use it."""
    return link.is_ours and link.kind == "bridge" and all(other.master != link.index for other in among)


def is_unused_namespace(name: str) -> bool:
    """Whether a namespace is kvmd's and has no tap in it; the calling thread enters it, and must end with this."""
    try:
        namespace.enter(name)
    except HostError:
        return False
    with Links() as links:
        found = links.all()
    return any(link.name == "lo" and link.is_ours for link in found) and all(
        link.kind != "tun" or not link.is_ours for link in found
    )
