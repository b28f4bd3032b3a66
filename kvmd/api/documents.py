"""Answers as plain data: what ``kvmd.api.models`` describes, without making a model for each.

``tests/api`` hold every answer against the OpenAPI document, which is made of the models.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvmd import __version__
from kvmd.api.models import HostFacts
from kvmd.fleet.base import Balloon, MachineEnd, MachineInfo
from kvmd.guests import GUESTS
from kvmd.log import iso_time
from kvmd.spec.machine import BUILTIN_PREFIX, MachineSpec

_BUILTIN_NAMES = {guest.path: BUILTIN_PREFIX + name for name, guest in GUESTS.items()}


def machines_document(machines: Iterable[MachineInfo]) -> dict[str, object]:
    """Return all machines."""
    return {"machines": [machine_document(info) for info in machines]}


def machine_document(info: MachineInfo) -> dict[str, object]:
    """Return a machine as it is now."""
    return {
        "name": info.name,
        "state": info.state,
        "spec": _spec(info.spec),
        "owner_uid": info.owner_uid,
        "created": iso_time(info.created_ns),
        "started": None if info.started_ns is None else iso_time(info.started_ns),
        "pid": info.pid,
        "facts": info.facts,
        "end": None if info.end is None else _end(info.end),
    }


def balloon_document(balloon: Balloon) -> dict[str, int]:
    """Return what memory a guest does without."""
    return {
        "target": balloon.target_bytes,
        "actual": balloon.actual_bytes,
        "given_back": balloon.given_back_bytes,
        "held": balloon.held_bytes,
    }


def waited_document(info: MachineInfo, *, reached: bool) -> dict[str, object]:
    """Return what a wait came to."""
    return {"reached": reached, "machine": machine_document(info)}


def host_document(host: HostFacts) -> dict[str, object]:
    """Return the daemon and its host."""
    return {"version": __version__, "host": host.model_dump(mode="json")}


def image_name(spec: MachineSpec) -> str:
    """Return an image as a client would name it."""
    return _BUILTIN_NAMES.get(spec.guest) or str(spec.guest)


def _spec(spec: MachineSpec) -> dict[str, object]:
    bounds = spec.conversion
    return {
        "image": image_name(spec),
        "vcpus": spec.vcpus,
        "memory": spec.memory,
        "accelerator": spec.accelerator,
        "protection": spec.protection,
        "tripwire": spec.tripwire,
        "initial": spec.initial,
        "cpl": spec.cpl,
        "arguments": spec.arguments,
        "conversion": {
            "chunk": bounds.chunk,
            "no_progress_limit": bounds.no_progress_limit,
            "max_ranges": bounds.max_ranges,
            "implicit": bounds.implicit,
            "rate": bounds.rate,
        },
        "initrd": None if spec.initrd is None else str(spec.initrd),
        "cmdline": spec.cmdline,
        "disks": [str(disk.path) for disk in spec.disks],
        "networks": [network.bridge or network.kind for network in spec.networks],
        "entropy": spec.kernel is not None and spec.entropy,
        "balloon": spec.balloon,
        "balloon_target": spec.balloon_target,
        "agent": spec.agent,
        "limits": {"memory": spec.limits.memory, "cpus": spec.limits.cpus, "tasks": spec.limits.tasks},
    }


def _end(end: MachineEnd) -> dict[str, object]:
    return {
        "reason": end.reason,
        "message": end.message,
        "status": end.status,
        "signal": end.signal,
        "time": iso_time(end.wall_ns),
    }
