"""The warmed parent of machines: imports everything once, opens nothing, and forks: on request, or just before one.

Started as ``python -m kvmd.machine_process.spawner FD`` with a socket (SOCK_SEQPACKET) as FD, whose other end belongs
to the daemon. It has one thread, so that a fork is safe. Machines are its children and outlive the daemon: when the
socket is at its end the spawner forks no more, waits for its children, and ends with the last. Of a child that ended
without an ``end.json`` it writes ``exit.json`` into the machine's folder, whether a daemon runs or not.

A request is one packet, ``Spawn``, with the descriptors of ``kvmd.machine_process.process.Inheritance`` in its order;
the answers are ``Spawned`` and, at a child's end, ``Reaped``.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

import msgspec

from kvmd.machine import Machine
from kvmd.machine_process.folder import END, EXIT, EndFile, ExitFile, MachineFolder
from kvmd.machine_process.hosted import OpenMachine
from kvmd.machine_process.process import Inheritance, live
from kvmd.machine_process.spare import Spare, open_child
from kvmd.machine_process.spawning import DESCRIPTORS_LIMIT, PACKET_LIMIT, Reaped, Spawn, Spawned
from kvmd.machine_process.warming import rehearse, warm
from kvmd.stop import ExitStatus

SPARE_AFTER_MS = 100
"""Milliseconds in which nothing happens until the next machine's process is forked, while nobody waits for it."""


@dataclass(frozen=True, slots=True)
class _Child:
    pid: int
    pidfd: int
    folder: int


class Spawner:
    """Forks and reaps.

    Args:
        link: to the daemon; taken over.
        open_machine: what the children make their machines with.
    """

    def __init__(self, link: socket.socket, open_machine: OpenMachine) -> None:
        self._link = link
        self._open_machine = open_machine
        self._children: dict[int, _Child] = {}
        self._spare: Spare | None = None
        self._keeps_spare = True

    def run(self) -> None:
        """Serve until the daemon has gone, and the last child too."""
        poll = select.poll()
        poll.register(self._link, select.POLLIN)
        linked, link = True, self._link.fileno()
        while linked or self._children:
            wants_spare = linked and self._keeps_spare and self._spare is None
            ready = poll.poll(SPARE_AFTER_MS if wants_spare else None)
            if not ready:
                self._make_spare(poll)
            for fd, _ in ready:
                if fd in self._children:
                    poll.unregister(fd)
                    self._reap(self._children.pop(fd), linked=linked)
                elif self._spare is not None and fd == self._spare.pidfd:
                    # Somebody killed it: from now on machines are forked when they are asked for.
                    self._keeps_spare = False
                    self._dismiss_spare(poll)
                elif linked and fd == link and not self._serve_one(poll):
                    # In the same turn the spare may have ended: that is not to be heeded any more.
                    linked = False
                    poll.unregister(self._link)
                    self._link.close()
                    self._dismiss_spare(poll)

    def _serve_one(self, poll: select.poll) -> bool:
        """Take one request; tell whether there may be more."""
        try:
            data, fds, _, _ = socket.recv_fds(self._link, PACKET_LIMIT, DESCRIPTORS_LIMIT)
        except OSError:
            return False
        if not data:
            return False
        try:
            number = msgspec.msgpack.decode(data, type=Spawn).number
            child = self._fork(Inheritance.received(fds))
        except (msgspec.MsgspecError, OSError, ValueError) as error:
            for fd in fds:
                os.close(fd)
            with suppress(msgspec.MsgspecError):
                self._tell(Spawned(msgspec.msgpack.decode(data, type=Spawn).number, 0, str(error)))
            return True
        for fd in fds[1:]:
            os.close(fd)
        self._children[child.pidfd] = child
        poll.register(child.pidfd, select.POLLIN)
        self._tell(Spawned(number, child.pid))
        return True

    def _fork(self, inherited: Inheritance) -> _Child:
        spare = self._spare
        if spare is not None and spare.become(inherited):
            self._spare = None
            return _Child(spare.pid, spare.pidfd, inherited.folder)
        pid = os.fork()
        if pid == 0:
            self._be_child(lambda: inherited)
        return _Child(pid, open_child(pid), inherited.folder)

    def _make_spare(self, poll: select.poll) -> None:
        try:
            self._spare = Spare(self._be_child, partial(rehearse, self._open_machine))
        except OSError:
            self._keeps_spare = False
        else:
            poll.register(self._spare.pidfd, select.POLLIN)

    def _dismiss_spare(self, poll: select.poll) -> None:
        if self._spare is not None:
            poll.unregister(self._spare.pidfd)
            self._spare.dismiss()
            self._spare = None

    def _be_child(self, given: Callable[[], Inheritance | None]) -> NoReturn:
        """Be the machine's process, or none."""
        status: int = ExitStatus.INTERNAL
        try:
            # A session of its own: nothing that is sent to the daemon's terminal or process group reaches it.
            os.setsid()
            self._link.close()
            if self._spare is not None:
                self._spare.forget()
            for child in self._children.values():
                os.close(child.pidfd)
                os.close(child.folder)
            inherited = given()
            status = 0 if inherited is None else live(inherited, self._open_machine)
        except BaseException:  # noqa: BLE001 - nothing of the parent's may run in the child
            traceback.print_exc()
        finally:
            with suppress(Exception):
                sys.stderr.flush()
            os._exit(status)

    def _reap(self, child: _Child, *, linked: bool) -> None:
        _, wait_status = os.waitpid(child.pid, 0)
        os.close(child.pidfd)
        code = os.waitstatus_to_exitcode(wait_status)
        status, number = (code, None) if code >= 0 else (None, -code)
        folder = MachineFolder(child.folder)
        with suppress(Exception), folder:
            if folder.read(END, EndFile) is None:
                folder.write(EXIT, ExitFile(child.pid, status, number, time.time_ns()), durable=True)
        folder.close()
        if linked:
            self._tell(Reaped(child.pid, status, number))

    def _tell(self, message: msgspec.Struct) -> None:
        # A daemon that does not read finds everything in the folders.
        with suppress(OSError):
            self._link.send(msgspec.msgpack.encode(message), socket.MSG_DONTWAIT)


def serve(link_fd: int, open_machine: OpenMachine) -> None:
    """Be the spawner until it is not needed any more.

    Args:
        link_fd: descriptor of the socket.
        open_machine: what the children make their machines with.
    """
    # The daemon does not wait for this process, which may outlive it.
    if os.fork():
        os._exit(0)
    os.setsid()
    # What is meant for the daemon is not meant for its machines: they are ended one by one.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    # Two descriptors a child.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    # Frozen objects stay shared with all children.
    warm()
    Spawner(socket.socket(fileno=link_fd), open_machine).run()


if __name__ == "__main__":
    serve(int(sys.argv[1]), Machine.open)
