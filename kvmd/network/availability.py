"""What of guests' networks works here: asked without making anything."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from kvmd.network.tap import DEVICE

CAP_NET_ADMIN, CAP_SYS_ADMIN = 12, 21
"""linux/capability.h."""

_STATUS = Path("/proc/thread-self/status")


def missing_for_bridges() -> str | None:
    """Return why no guest can be on a bridge, or None. Nothing of vhost is needed."""
    if importlib.util.find_spec("pyroute2") is None:
        return "the package pyroute2 is not installed"
    if not DEVICE.exists():
        return f"{DEVICE} is missing: load the module tun (modprobe tun)"
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        return f"{DEVICE} may not be opened by this user"
    return None if _capable(CAP_NET_ADMIN) else "no CAP_NET_ADMIN: docs/network.md says how to give it"


def missing_for_namespaces() -> str | None:
    """Return why no guest can have a network namespace of its own, or None."""
    return missing_for_bridges() or (None if _capable(CAP_SYS_ADMIN) else "no CAP_SYS_ADMIN")


def _capable(number: int) -> bool:
    """Whether this thread has the capability (capabilities(7), proc(5): CapEff)."""
    for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> number & 1)
    return False
