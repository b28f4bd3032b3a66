"""A machine's process in a unit of its own, before it knows which machine: it has imported everything, and waits.

Started as ``kvmd machine-process --wait-at SOCKET`` by systemd/kvmd-machine@.service. It connects to the daemon (a
Unix socket, SOCK_SEQPACKET), says ``Waiting``, and becomes the machine that the daemon's one answer makes it:
``Become``, with the descriptors of ``kvmd.machine_process.process.Inheritance`` in its order. When the daemon hangs up
before that, it ends: the next daemon may be another version, and starts others.
"""

from __future__ import annotations

import os
import select
import socket
from pathlib import Path

import msgspec

from kvmd import __version__
from kvmd.errors import HostError
from kvmd.machine_process.hosted import OpenMachine
from kvmd.machine_process.process import Inheritance, Unit, live
from kvmd.machine_process.spawning import DESCRIPTORS_LIMIT, PACKET_LIMIT, Become, Waiting
from kvmd.machine_process.warming import rehearse, warm
from kvmd.service_manager import ServiceManager


def wait_to_become(path: Path, open_machine: OpenMachine, manager: ServiceManager, *, journal: bool) -> int:
    """Wait for a machine, be it, and return the process's exit status: 0 where its end is written down.

    Args:
        path: the daemon's socket.
        open_machine: makes the machine.
        manager: told when this waits, and that it lives.
        journal: log to the journal too.

    Raises:
        HostError: no daemon listens there.
    """
    warm()
    rehearse(open_machine)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as daemon:
        try:
            daemon.connect(str(path))
        except OSError as error:
            raise HostError(f"no daemon listens at {path}: {error.strerror}") from error
        daemon.send(msgspec.msgpack.encode(Waiting(__version__)))
        manager.ready("waits for a machine")
        given = _given(daemon, manager)
    if given is None:
        return 0
    become, inherited = given
    manager.status(f"machine {become.name}")
    unit = Unit(become.unit, os.environ.get("INVOCATION_ID", ""), manager, journal=journal)
    return live(inherited, open_machine, unit)


def _given(daemon: socket.socket, manager: ServiceManager) -> tuple[Become, Inheritance] | None:
    poll = select.poll()
    poll.register(daemon, select.POLLIN)
    seconds = manager.watchdog_seconds
    while not poll.poll(None if seconds is None else seconds * 1000):
        manager.alive()
    manager.alive()
    try:
        data, fds, _, _ = socket.recv_fds(daemon, PACKET_LIMIT, DESCRIPTORS_LIMIT)
    except OSError:
        return None
    if not data:
        return None
    return msgspec.msgpack.decode(data, type=Become), Inheritance.received(fds)
