"""A machine over the API of a running daemon: from its POST to the guest's first output, beside QEMU doing the same.

The daemon is ``kvmd daemon``, a process of its own with its spawner and its machines' processes; the client speaks HTTP
over its Unix socket: one request that creates, one that starts, and one that follows the console.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path

from kvmd.benchmark.measure import CannotMeasure, Fact, Options, Ratio, Report, Series, take_turns
from kvmd.benchmark.qemu import first_byte, qemu_firmware
from kvmd.benchmark.runs import require_kvm
from kvmd.benchmark.waiting import SERVING

TARGET = 1.5
"""What it may take at most, in starts of QEMU."""

_POST = "POST, start, first output: a fork"
_WAITING = "POST, start, first output: a process that waited"
_QEMU = "qemu -M microvm, first output"
_SECONDS = 30
_RUN_SECONDS = 0.1
"""How long a machine runs before it is paused: it waits for what is typed by then."""

_IMPORTS_SECONDS = 1.5
"""What the process that takes the place of one which became a machine has for its imports."""


def measure(options: Options) -> Report:
    """Measure both in turns."""
    require_kvm()
    report = Report("post", "a machine over HTTP, from its POST to the guest's first output")
    with (
        tempfile.TemporaryDirectory() as name,
        tempfile.TemporaryDirectory() as other,
        daemon(Path(name)) as path,
        daemon_with_pool(Path(other)) as other_path,
    ):
        client, waited = Client(path), Client(other_path)
        client.first_output()  # the first one waits for the machines' parent to import everything
        things: dict[str, Callable[[], float]] = {
            _POST: client.first_output,
            _WAITING: lambda: waited.first_output(after_seconds=_IMPORTS_SECONDS),
        }
        firmware = qemu_firmware(report)
        if firmware is not None:
            things[_QEMU] = partial(first_byte, firmware)
        series = take_turns(things, rounds=options.rounds(30), unit="ms")
        report.facts.append(Fact(Series("of which creating, a fork", "ms", tuple(client.created[2:]))))
        report.facts.append(Fact(Series("of which creating, a process that waited", "ms", tuple(waited.created[1:]))))
    for label in (_POST, _WAITING):
        if _QEMU in series:
            report.ratios.append(Ratio(series[label], series[_QEMU], TARGET))
        else:
            report.facts.append(Fact(series[label]))
    report.notes.append(
        "both guests print through a 16550 at once, QEMU's from its reset vector, kvmd's (builtin:hello, 64 MiB) after "
        "its start-up code, so the first output comes some milliseconds after the first instruction; kvmd was told to "
        "create, start and show a console in three requests, its daemon ran already; QEMU is timed from its exec. A "
        "fork: without systemd, made since the machine before; a process that waited: as in a unit of systemd's, which "
        "started it before the POST"
    )
    return report


@contextmanager
def daemon_with_pool(folder: Path) -> Iterator[Path]:
    """Run a daemon with processes that wait in a folder until the block ends; yield the path of its API."""
    with _running([sys.executable, "-m", "kvmd.benchmark.waiting", str(folder)], SERVING):
        yield folder / "api"


@contextmanager
def daemon(folder: Path) -> Iterator[Path]:
    """Run a daemon in a folder until the block ends, its machines with it; yield the path of its API."""
    path = folder / "api"
    config = folder / "kvmd.toml"
    config.write_text(f'[api]\nsocket = "{path}"\n', encoding="utf-8")
    command = [sys.executable, "-m", "kvmd", "daemon", "--config", str(config), "--state", str(folder / "state")]
    with _running([*command, "--stop-machines", "--log-format", "json"], b"api-serving"):
        yield path


@contextmanager
def _running(command: list[str], serving: bytes) -> Iterator[None]:
    """Run a daemon until the block ends, which begins when that says that it serves."""
    # What it prints is not this process's to print: on stdout there may be JSON.
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None  # noqa: S101 - it is a pipe
        try:
            while serving not in (line := process.stderr.readline()):
                if not line:
                    raise CannotMeasure("the daemon did not start")
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            process.stderr.read()


class Client:
    """One after the other, machines from their beginning to their end."""

    def __init__(self, path: Path) -> None:
        self._path = os.fspath(path)
        self._numbers = count()
        self.created: list[float] = []

    def create_idle(self, name: str) -> int:
        """Create a machine that has run and is paused, as QEMU's is then, and return its process's id."""
        with self._connected() as connection:
            answer = _ask(connection, "POST", "/v1/machines", {"image": "builtin:echo", "name": name})
            _ask(connection, "POST", f"/v1/machines/{name}/start")
            time.sleep(_RUN_SECONDS)
            _ask(connection, "POST", f"/v1/machines/{name}/pause")
        return int(json.loads(answer)["pid"])

    def first_output(self, then: Callable[[], None] | None = None, *, after_seconds: float = 0) -> float:
        """Return the milliseconds from a machine's POST to its guest's first output; call ``then`` at that moment.

        It begins after some seconds, in which processes that are to wait can start.
        """
        time.sleep(after_seconds)
        name = f"post-{next(self._numbers)}"
        machine = f"/v1/machines/{name}"
        with self._connected() as asking, self._connected() as watching:
            began = time.perf_counter()
            _ask(asking, "POST", "/v1/machines", {"image": "builtin:hello", "name": name})
            self.created.append((time.perf_counter() - began) * 1000)
            watching.sendall(_request("GET", f"{machine}/console/output"))
            _ask(asking, "POST", f"{machine}/start")
            seen = b""
            while not seen.partition(b"\r\n\r\n")[2]:  # the header comes at once, the first chunk with the output
                more = watching.recv(65536)
                if not more:
                    raise CannotMeasure(f"the console ended after {seen!r}")
                seen += more
            passed = (time.perf_counter() - began) * 1000
            if then is not None:
                then()
            _ask(asking, "GET", f"{machine}/wait?state=stopped")
            _ask(asking, "DELETE", machine)
        return passed

    @contextmanager
    def _connected(self) -> Iterator[socket.socket]:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_SECONDS)
            connection.connect(self._path)
            yield connection


def _request(method: str, target: str, body: object = None) -> bytes:
    data = b"" if body is None else json.dumps(body).encode()
    kind = "Content-Type: application/json\r\n" if data else ""
    return f"{method} {target} HTTP/1.1\r\nHost: kvmd\r\n{kind}Content-Length: {len(data)}\r\n\r\n".encode() + data


def _ask(connection: socket.socket, method: str, target: str, body: object = None) -> bytes:
    connection.sendall(_request(method, target, body))
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += connection.recv(65536)
    head, _, content = answer.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 2"):
        raise CannotMeasure(f"{method} {target} was refused: {answer!r}")
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    left = int(fields.get(b"content-length", 0)) - len(content)
    while left > 0:
        more = connection.recv(left)
        if not more:
            raise CannotMeasure(f"{method} {target}: the daemon hung up")
        content += more
        left -= len(more)
    return content
