"""The daemon's state folder: one folder for each machine, and a lock that keeps a second daemon out.

::

    STATE/lock              held (flock) by the daemon that runs, whose process it names
    STATE/machines/NAME/    one machine: see kvmd.machine_process.folder
    STATE/broken/           what was found in machines/ and is no machine's folder any more: nothing of it is used
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fcntl import LOCK_EX, LOCK_NB, LOCK_UN, flock
from pathlib import Path

from kvmd.errors import HostError

_FOLDER_MODE = 0o700
_LOCK_SECONDS = 0.5
"""How long a daemon that was killed may still hold the lock: through a child that it had forked, up to its exec."""

_LOOK_SECONDS = 0.02


class StateFolder:
    """A state folder that is ours.

    Attributes:
        path: its own.
        machines: where the machines' folders are.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.machines = path / "machines"
        self._broken = path / "broken"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folders where they are missing, and hold the lock.

        Raises:
            HostError: it cannot be used, or another daemon uses it.
        """
        try:
            for folder in (self.path, self.machines):
                folder.mkdir(mode=_FOLDER_MODE, parents=True, exist_ok=True)
            lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise HostError(f"cannot use the state folder {self.path}: {error.strerror}") from error
        try:
            self._take(lock)
            try:
                yield
            finally:
                # To close it would not do where a process that is about to exec has a copy of the descriptor.
                flock(lock, LOCK_UN)
        finally:
            os.close(lock)

    def _take(self, lock: int) -> None:
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                flock(lock, LOCK_EX | LOCK_NB)
            except OSError as error:
                if time.monotonic() < deadline:
                    time.sleep(_LOOK_SECONDS)
                    continue
                raise HostError(
                    f"another daemon{_holder(lock)} uses the state folder {self.path}: stop it, wait for its end, or "
                    "use another folder"
                ) from error
            break
        with suppress(OSError):  # a full disk: then nobody is named
            os.ftruncate(lock, 0)
            os.pwrite(lock, b"%d\n" % os.getpid(), 0)

    def make(self, name: str) -> int:
        """Make the folder of a new machine, and return its descriptor.

        Raises:
            FileExistsError: there is one.
            OSError: it cannot be made.
        """
        path = self.machines / name
        path.mkdir(mode=_FOLDER_MODE)
        try:
            return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            # Out of descriptors, for example: its name would be taken until the next daemon.
            path.rmdir()
            raise

    def remove(self, name: str) -> None:
        """Remove a machine's folder with all that is in it; harmless where there is none.

        Raises:
            OSError: some of it cannot be removed.
        """
        # Aside first: what is removed half-way must not pass for a machine.
        aside = self.path / f".removed-{name}-{time.time_ns()}"
        try:
            (self.machines / name).rename(aside)
        except FileNotFoundError:
            return
        shutil.rmtree(aside)

    def set_aside(self, name: str) -> Path:
        """Move something out of the machines' folder, and return where it is now.

        Raises:
            OSError: it cannot be moved.
        """
        self._broken.mkdir(mode=_FOLDER_MODE, exist_ok=True)
        return (self.machines / name).rename(self._broken / f"{name}-{time.time_ns()}")

    def sweep(self) -> None:
        """Remove what an interrupted ``remove`` left."""
        for path in self.path.glob(".removed-*"):
            shutil.rmtree(path, ignore_errors=True)


def _holder(lock: int) -> str:
    """Return who holds the lock, in brackets, where that is written in it."""
    with suppress(OSError):
        found = os.pread(lock, 32, 0).strip()
        if found.isdigit():
            return f" (process {found.decode()})"
    return ""
