"""A machine's folder: all that is known of it while nobody who knows it runs.

===================  ==================================================================  ==========================
file                 what                                                                written by
===================  ==================================================================  ==========================
``machine.json``     ``MachineFile``: its spec, whose it is                              the fleet, before all else
``control``          its control socket                                                  the fleet, or the process
``process.json``     ``ProcessFile``: which process it is                                the process, first of all
``lifecycle-*``      lines of ``LifecycleEvent``                                         the process; at a violent
                                                                                         end the fleet
``console-*``        what the guest printed                                              the process
``log-*``            its log, lines of JSON                                              the process
``conversions-*``    the last conversions, while it lives                                the process
``stderr``           what Python says of a crash; mostly empty                           the process
``conversions.last`` ``LastConversions``, in place of the former                         the process, at its end; at
                                                                                         a violent end the fleet
``end.json``         ``EndFile``: how it ended                                           the process, last of all; at
                                                                                         a violent end the fleet
``exit.json``        ``ExitFile``: how the process ended, where it did not say so        its parent: the spawner
===================  ==================================================================  ==========================

Files ending in ``.json`` and ``.last`` are written aside and renamed: they are whole or not there. The folder is used
through a descriptor, so that nobody gets hold of another folder that took its name.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Self, TypeVar

import msgspec

from kvmd.closing import Closing
from kvmd.conversion.record import ConversionRecord
from kvmd.errors import KvmdError
from kvmd.machine_process.messages import CounterValues, encode_hook
from kvmd.spec.machine import MachineSpec

MACHINE = "machine.json"
CONTROL = "control"
PROCESS = "process.json"
LIFECYCLE = "lifecycle"
CONSOLE: Final = "console"
LOG: Final = "log"
STDERR = "stderr"
LAST_CONVERSIONS = "conversions.last"
END = "end.json"
EXIT = "exit.json"

LAST_RECORDS = 16384
"""Conversions that outlive the machine: two megabytes of file, at most."""

_BACKLOG = 128
"""Connections that wait for a process that is not ready yet."""

_ASIDE = ".new"
_FILE_LIMIT = 64 << 20

T = TypeVar("T")


class BadFile(KvmdError):
    """A file of a machine's folder does not hold what it should."""


class MachineFile(msgspec.Struct, frozen=True):
    """What a machine is made of, and whose it is: ``kvmd.fleet.base.MachineInfo`` says what each means."""

    spec: MachineSpec
    owner_uid: int
    created_ns: int


class ProcessFile(msgspec.Struct, frozen=True):
    """Which process a machine is.

    Attributes:
        pid: its number.
        start_ticks: field 22 of its /proc/pid/stat.
        boot_id: of the boot that both belong to: /proc/sys/kernel/random/boot_id.
        unit: the systemd unit that it is the main process of, or "".
        invocation: which of the unit's starts it is (systemd.exec(5), INVOCATION_ID).
    """

    pid: int
    start_ticks: int
    boot_id: str
    unit: str = ""
    invocation: str = ""


class EndFile(msgspec.Struct, frozen=True):
    """How a machine ended: ``kvmd.fleet.base.MachineEnd`` says what each means."""

    reason: str
    message: str
    status: int
    signal: int | None
    wall_ns: int
    started_ns: int | None = None
    facts: dict[str, Any] = {}
    counters: CounterValues | None = None


class ExitFile(msgspec.Struct, frozen=True):
    """How a process ended, as its parent saw it: ``status`` or ``signal`` is None.

    ``result`` is what systemd makes of it, where it was a unit's: systemd.exec(5), SERVICE_RESULT.
    """

    pid: int
    status: int | None
    signal: int | None
    wall_ns: int
    result: str = ""


class LastConversions(msgspec.Struct, frozen=True):
    """The conversions that were kept at a machine's end.

    Attributes:
        count: how many there were in all.
        records: the last of them.
    """

    count: int
    records: list[ConversionRecord]


class MachineFolder(Closing):
    """One machine's folder, open.

    Args:
        fd: its descriptor, taken over.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open the folder at ``path``.

        Raises:
            OSError: it is not there, or no folder.
        """
        return cls(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW))

    @property
    def control(self) -> str:
        """A path of the control socket that fits into its 108 bytes however deep the folder lies (unix(7))."""
        return f"/proc/self/fd/{self.fd}/{CONTROL}"

    def write(self, name: str, content: msgspec.Struct, *, durable: bool = False) -> None:
        """Write a file as a whole.

        Args:
            name: the file's.
            content: what it says.
            durable: make sure that it survives the host's crash.

        Raises:
            OSError: it could not be written; what was there is as before.
        """
        aside = name + _ASIDE
        encode = msgspec.json.encode if name.endswith(".json") else msgspec.msgpack.encode
        data = memoryview(encode(content, enc_hook=encode_hook))
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
            fd = os.open(aside, flags, 0o600, dir_fd=self.fd)
            try:
                while data:
                    data = data[os.write(fd, data) :]
                if durable:
                    os.fsync(fd)
            finally:
                os.close(fd)
            os.rename(aside, name, src_dir_fd=self.fd, dst_dir_fd=self.fd)
            if durable:
                os.fsync(self.fd)
        except OSError:
            with suppress(OSError):
                os.unlink(aside, dir_fd=self.fd)
            raise

    def read(self, name: str, kind: type[T]) -> T | None:
        """Return what a file says, or None where there is none.

        Raises:
            BadFile: it cannot be read, or does not say that.
        """
        try:
            fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=self.fd)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise BadFile(f"{name}: {error.strerror}") from error
        try:
            with open(fd, "rb") as file:  # noqa: PTH123 - a descriptor has no path
                data = file.read(_FILE_LIMIT)
        except OSError as error:
            raise BadFile(f"{name}: {error.strerror}") from error
        decode = msgspec.json.decode if name.endswith(".json") else msgspec.msgpack.decode
        try:
            return decode(data, type=kind, dec_hook=decode_hook)
        except (msgspec.MsgspecError, KvmdError, ValueError, RecursionError) as error:
            raise BadFile(f"{name}: {' '.join(str(error).split())}") from error

    def close(self) -> None:
        """Close it; harmless the second time."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def listen_in(folder: MachineFolder) -> socket.socket:
    """Return a machine's control socket, bound in its folder and listening.

    Raises:
        OSError: it cannot be made: EADDRINUSE where there is something of its name.
    """
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listening.bind(folder.control)
        os.chmod(CONTROL, 0o600, dir_fd=folder.fd)
        listening.listen(_BACKLOG)
    except OSError:
        listening.close()
        raise
    return listening


def decode_hook(kind: type, value: object) -> object:
    """Make paths of text: the one type in kvmd's messages and files that msgspec does not know.

    Raises:
        NotImplementedError: something else is wanted.
    """
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise NotImplementedError(f"{kind} has no place in a message")


def start_ticks(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot (proc(5), field 22 of stat); None without one."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123 - /proc needs no path handling
            # The name, field 2, may hold anything, brackets and spaces too.
            return int(file.read().rpartition(b")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return None


def boot_id() -> str:
    """Return the name of this boot of the host, or "" where the host does not say."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:  # noqa: PTH123 - as above
            return file.read().strip()
    except OSError:
        return ""
