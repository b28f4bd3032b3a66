"""The process of one machine: what happens in it from its first line to its exit status."""

from __future__ import annotations

import faulthandler
import os
import resource
import socket
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import KW_ONLY, dataclass

import msgspec
import structlog
import trio

from kvmd import log
from kvmd.errors import ConfigError, HostError, ImageError, KvmdError
from kvmd.journal import Journal
from kvmd.log_buffer import LogBuffer
from kvmd.machine_process.cgroup import cgroup_of, lacking_limits
from kvmd.machine_process.control import ControlServer
from kvmd.machine_process.folder import (
    MACHINE,
    PROCESS,
    STDERR,
    BadFile,
    MachineFile,
    MachineFolder,
    ProcessFile,
    boot_id,
    start_ticks,
)
from kvmd.machine_process.host import MachineHost
from kvmd.machine_process.hosted import OpenMachine
from kvmd.machine_process.spawning import Birth
from kvmd.service_manager import ServiceManager
from kvmd.spec.machine import MachineSpec
from kvmd.stop import ExitStatus

_OOM_SCORE = 300
"""Added to the kernel's idea of who should go first when memory runs out: a guest before the daemon."""

_COMM_LIMIT = 15
"""Bytes of a process's name (proc(5), /proc/pid/comm)."""


@dataclass(frozen=True, slots=True)
class Inheritance:
    """The descriptors that a new process starts with, all its own.

    Attributes:
        folder: of the machine's folder.
        listening: of its control socket, bound and listening.
        birth: of a pipe for ``Birth``, or None where nobody waits for it.
        files: in place of those that the spec names (``MachineSpec.files``), one for each; or none.
    """

    folder: int
    listening: int
    birth: int | None
    files: tuple[int, ...]

    @classmethod
    def received(cls, descriptors: Sequence[int]) -> Inheritance:
        """Return what came over a socket, in the order of the attributes; somebody waits for the birth then.

        Raises:
            ValueError: there are too few.
        """
        folder, listening, birth, *files = descriptors
        return cls(folder, listening, birth, tuple(files))


@dataclass(frozen=True, slots=True)
class Unit:
    """The systemd unit that the process is the main process of.

    Attributes:
        name: of the unit.
        invocation: which of its starts this is.
        manager: told that the machine's loop turns.
        journal: whether the log goes to the journal, too.
    """

    name: str
    invocation: str
    manager: ServiceManager
    _: KW_ONLY
    journal: bool


def live(inherited: Inheritance, open_machine: OpenMachine, unit: Unit | None = None) -> int:
    """Run the machine and return the process's exit status: the machine's.

    In a unit it is 0 for every end that is written down: a unit that has failed is then one that ended violently.

    Args:
        inherited: see ``Inheritance``.
        open_machine: makes the machine.
        unit: the one that the process is in, where the daemon started it so.
    """
    pid = os.getpid()
    ticks = start_ticks(pid) or 0
    with ExitStack() as stack:
        folder = stack.enter_context(MachineFolder(inherited.folder))
        listening = stack.enter_context(socket.socket(fileno=inherited.listening))
        teller = _Teller(inherited.birth)
        stack.callback(teller.close)
        try:
            own = ("", "") if unit is None else (unit.name, unit.invocation)
            folder.write(PROCESS, ProcessFile(pid, ticks, boot_id(), *own))
            _settle(folder, stack)
            about = folder.read(MACHINE, MachineFile)
            if about is None:
                raise BadFile(f"{MACHINE} is missing")
            _name_process(about.spec.name)
            buffer = LogBuffer(is_terminal=False)
            journal = stack.enter_context(Journal()) if unit is not None and unit.journal else None
            log.configure(log_format="json", stream=buffer, journal=journal)
            _check_limits(about.spec)
            machine = open_machine(about.spec, files=inherited.files)
        except (KvmdError, OSError) as error:
            teller.tell(Birth(pid, ticks, problem=_one_line(error), kind=_kind(error)))
            if unit is not None:
                return 0  # the daemon has heard why
            return ExitStatus.CONFIG if isinstance(error, ConfigError | ImageError) else ExitStatus.HOST
        stack.callback(machine.close)
        for fd in inherited.files:
            os.close(fd)
        host = MachineHost(machine, folder, log_buffer=buffer, log=structlog.get_logger("kvmd"))
        server = ControlServer(listening, pid, ticks)

        def ready() -> None:
            teller.tell(Birth(pid, ticks, facts=dict(machine.facts)))
            if teller.unheard:
                # Whoever asked for this machine has given up, and knows of none.
                host.stop()

        async def serve(host: MachineHost) -> None:
            async with trio.open_nursery() as nursery:
                if unit is not None and unit.manager.watchdog_seconds is not None:
                    nursery.start_soon(_feed_watchdog, unit.manager, unit.manager.watchdog_seconds)
                await server.serve(host)

        stop = trio.run(host.run, serve, ready)
        written = unit is not None and host.end_written
        return 0 if written else stop.status


async def _feed_watchdog(manager: ServiceManager, seconds: float) -> None:
    """Say that the machine's event loop turns."""
    while True:
        manager.alive()
        await trio.sleep(seconds)


def _check_limits(spec: MachineSpec) -> None:
    """See that the kernel enforces what the spec says, whoever started this process.

    Raises:
        HostError: it does not.
    """
    lacking = lacking_limits(spec.limits, cgroup_of()) if spec.limits.given else []
    if lacking:
        raise HostError(
            f"nothing enforces {', '.join(lacking)}: start the machine in a unit that has these limits, as "
            "kvmd.service does (docs/daemon.md), or leave [limits] out"
        )


class _Teller:
    """The pipe to whoever asked for the machine."""

    def __init__(self, fd: int | None) -> None:
        self._fd = fd
        self.unheard = False

    def tell(self, birth: Birth) -> None:
        """Say it, and hang up."""
        if self._fd is None:
            return
        try:
            os.write(self._fd, msgspec.msgpack.encode(birth, enc_hook=repr))
        except OSError:
            self.unheard = True
        self.close()

    def close(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)


def _settle(folder: MachineFolder, stack: ExitStack) -> None:
    """Make this process one that leaves nothing of its guest behind when it dies."""
    # A core dump would hold the guest's memory.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:  # noqa: PTH123 - /proc
        file.write(str(_OOM_SCORE))
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
    stderr = os.open(STDERR, flags, 0o600, dir_fd=folder.fd)
    os.dup2(stderr, 2)
    os.close(stderr)
    faulthandler.enable(sys.__stderr__ if sys.__stderr__ is not None else 2)
    stack.callback(faulthandler.disable)


def _name_process(machine: str) -> None:
    """Name it for ps and top."""
    with suppress(OSError), open("/proc/self/comm", "w", encoding="ascii") as file:  # noqa: PTH123 - /proc
        file.write(f"kvmd:{machine}"[:_COMM_LIMIT])


def _kind(error: Exception) -> str:
    match error:
        case ConfigError():
            return "config"
        case ImageError():
            return "image"
        case HostError():
            return "host"
        case _:
            return "other"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
