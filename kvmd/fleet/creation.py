"""Making a machine's process: its folder, its socket, its fork, and its first words; or nothing of all that."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress

import msgspec
import structlog
import trio

from kvmd.errors import ConfigError, HostError, ImageError, KvmdError, MachineExists
from kvmd.fleet.base import MachineInfo
from kvmd.fleet.entry import Entry
from kvmd.fleet.parent import Parent
from kvmd.fleet.state_folder import StateFolder
from kvmd.fleet.which_process import open_pidfd
from kvmd.machine_process.folder import MACHINE, PROCESS, MachineFile, MachineFolder, ProcessFile, listen_in
from kvmd.machine_process.spawning import Birth
from kvmd.spec.machine import MachineSpec

_READ_BYTES = 65536
_KINDS = {"config": ConfigError, "image": ImageError, "host": HostError}

_log: structlog.stdlib.BoundLogger = structlog.get_logger("kvmd.fleet")


class Creator:
    """Makes machines in a state folder.

    Args:
        state: the folder.
        parent: starts their processes.
    """

    def __init__(self, state: StateFolder, parent: Parent) -> None:
        self._state = state
        self._parent = parent
        self._last_created_ns = 0

    async def create(self, spec: MachineSpec, *, owner_uid: int, files: Sequence[int]) -> Entry:
        """Return a machine whose process is there; its name must be free, and nobody else may be using it.

        Raises:
            MachineExists: there is a folder of that name.
            KvmdError: it cannot be made; nothing is left behind, nor is where this is cancelled.
        """
        self._parent.check(spec)
        # A machine is told from a later one of its name by this: see kvmd.fleet.places.
        created_ns = self._last_created_ns = max(time.time_ns(), self._last_created_ns + 1)
        try:
            folder = MachineFolder(self._state.make(spec.name))
        except FileExistsError as error:
            raise MachineExists(f"there is something named {spec.name} in the state folder already") from error
        except OSError as error:
            raise HostError(f"cannot make a folder for the machine: {error.strerror}") from error
        try:
            birth, pidfd = await self._be_born(folder, MachineFile(spec, owner_uid, created_ns), files)
        except BaseException as error:
            self._undo(folder, spec.name)
            if isinstance(error, OSError):
                raise HostError(f"cannot make the machine's files: {error.strerror}") from error
            raise
        info = MachineInfo(
            name=spec.name,
            spec=spec,
            state="created",
            owner_uid=owner_uid,
            created_ns=created_ns,
            started_ns=None,
            pid=birth.pid,
            facts=birth.facts,
            end=None,
        )
        return Entry(info, folder, pidfd)

    async def _be_born(self, folder: MachineFolder, about: MachineFile, files: Sequence[int]) -> tuple[Birth, int]:
        with ExitStack() as stack:
            folder.write(MACHINE, about)
            ours, its = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            stack.callback(os.close, ours)
            with ExitStack() as handed_over:
                # Once they are sent they live on in the socket, and then in the new process.
                handed_over.callback(os.close, its)
                # Made here, so that whoever looks finds it from the beginning: a connection to it is refused when,
                # and only when, there is no process that will ever answer.
                listening = handed_over.enter_context(listen_in(folder))
                fds = [folder.fd, listening.fileno(), its, *files]
                unit = await self._parent.spawn(fds, about.spec)
            with ExitStack() as failed:
                failed.callback(self._parent.release, unit)
                born = await self._first_words(ours)
                failed.pop_all()
            return born

    async def _first_words(self, ours: int) -> tuple[Birth, int]:
        data = bytearray()
        while True:
            await trio.lowlevel.wait_readable(ours)
            more = os.read(ours, _READ_BYTES)
            if not more:
                break
            data += more
        if not data:
            raise HostError("the machine's process ended before it was a machine")
        birth = msgspec.msgpack.decode(data, type=Birth)
        if birth.problem is not None:
            raise _KINDS.get(birth.kind, KvmdError)(birth.problem)
        pidfd = open_pidfd(birth.pid, birth.start_ticks)
        if pidfd is None:
            raise HostError("the machine's process ended as soon as it was there")
        return birth, pidfd

    def _undo(self, folder: MachineFolder, name: str) -> None:
        """Leave nothing: a process under way finds nobody who waits for it, and ends; one that is there is killed."""
        with suppress(KvmdError):
            process = folder.read(PROCESS, ProcessFile)
            pidfd = None if process is None else open_pidfd(process.pid, process.start_ticks)
            if pidfd is not None:
                Entry.kill_fd(pidfd)
                os.close(pidfd)
        folder.close()
        try:
            self._state.remove(name)
        except OSError as error:
            _log.error("machine-folder-not-removed", machine=name, problem=str(error))
