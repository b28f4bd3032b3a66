"""kvmctl as a process of its own, with pipes or a terminal."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.ctl.serving import SECONDS

COMMAND = (sys.executable, "-c", "from kvmd.ctl.main import main; main()")


def environment(path: Path) -> dict[str, str]:
    """Return what kvmctl needs to find a daemon at ``path``."""
    return {**os.environ, "KVMD_SOCKET": str(path), "TERM": "xterm", "COLUMNS": "200", "LINES": "40"}


class Process:
    """A kvmctl that runs; what it prints is read from ``reading``, what it is typed goes to ``writing``."""

    def __init__(self, process: subprocess.Popen[bytes], reading: int, writing: int) -> None:
        self.process = process
        self.reading = reading
        self.writing = writing
        self.seen = b""

    def type(self, data: bytes) -> None:
        os.write(self.writing, data)

    def until(self, wanted: bytes) -> bytes:
        """Return what it printed since the last call, up to and with ``wanted``."""
        deadline = time.monotonic() + SECONDS
        while wanted not in self.seen:
            ready, _, _ = select.select([self.reading], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"{wanted!r} did not come: {self.seen!r}"
            data = self._read()
            assert data, f"{wanted!r} did not come before the end: {self.seen!r}"
            self.seen += data
        before, _, self.seen = self.seen.partition(wanted)
        return before + wanted

    def rest(self) -> bytes:
        """Return what it prints to its end; not of a terminal, whose other end is ours as well."""
        while data := self._read():
            self.seen += data
        rest, self.seen = self.seen, b""
        return rest

    def wait(self) -> int:
        """Return its exit status."""
        return self.process.wait(SECONDS)

    def _read(self) -> bytes:
        try:
            return os.read(self.reading, 65536)
        except OSError:
            return b""  # EIO: nobody has the terminal's other end


@contextmanager
def on_terminal(path: Path, *arguments: str) -> Iterator[Process]:
    """Run kvmctl on a terminal of its own; both its outputs are there."""
    ours, theirs = pty.openpty()
    try:
        with _killed(
            subprocess.Popen(  # noqa: S603 - ours
                [*COMMAND, *arguments],
                stdin=theirs,
                stdout=theirs,
                stderr=theirs,
                env=environment(path),
                start_new_session=True,
            )
        ) as process:
            yield Process(process, ours, ours)
    finally:
        os.close(theirs)
        os.close(ours)


@contextmanager
def with_pipes(path: Path, *arguments: str) -> Iterator[Process]:
    """Run kvmctl with pipes; its errors are among its output."""
    with _killed(
        subprocess.Popen(  # noqa: S603 - ours
            [*COMMAND, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment(path),
            start_new_session=True,
            bufsize=0,
        )
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        with process.stdin, process.stdout:
            yield Process(process, process.stdout.fileno(), process.stdin.fileno())


@contextmanager
def _killed(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()
