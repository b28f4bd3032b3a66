"""A ``kvmd daemon`` as a process of its own, driven by its API with nothing but the standard library."""

from __future__ import annotations

import http.client
import json
import select
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvmd.closing import Closing

_READY_SECONDS = 120.0
_ANSWER_SECONDS = 300.0


class Daemon(Closing):
    """Runs until ``close``, and its machines with it.

    Args:
        folder: for its configuration, socket and state.
        images: folders whose files its machines may use, as disks too.
        bridges: which its machines may join.
        namespaces: whether its machines may have network namespaces.

    Raises:
        AssertionError: it does not serve.
    """

    def __init__(
        self, folder: Path, *, images: Sequence[Path] = (), bridges: Sequence[str] = (), namespaces: bool = False
    ) -> None:
        self._socket = folder / "api"
        config = folder / "kvmd.toml"
        folders = json.dumps([str(image) for image in images])
        config.write_text(
            f"[api]\nsocket = {json.dumps(str(self._socket))}\n"
            f"[images]\nfolders = {folders}\n[disks]\nfolders = {folders}\n"
            f"[networks]\nbridges = {json.dumps(list(bridges))}\nnamespaces = {json.dumps(namespaces)}\n"
        )
        self._log = folder / "daemon.log"
        command = [sys.executable, "-m", "kvmd", "daemon", "--config", str(config), "--state", str(folder / "state")]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen([*command, "--stop-machines"], stderr=log)  # noqa: S603 - ours
        try:
            self._wait_for_it()
        except BaseException:
            self.close()
            raise

    def ask(self, method: str, path: str, content: object = None) -> Any:
        """Return what the API answers, parsed; None for an answer without content.

        Raises:
            AssertionError: it refuses.
        """
        connection = _Connection(self._socket)
        try:
            header = {} if content is None else {"Content-Type": "application/json"}
            connection.request(method, path, None if content is None else json.dumps(content), header)
            answer = connection.getresponse()
            text = answer.read().decode()
            assert answer.status < http.HTTPStatus.BAD_REQUEST, f"{method} {path}: {text}"
            return json.loads(text) if text else None
        finally:
            connection.close()

    @property
    def pid(self) -> int:
        """Of its process."""
        return self._process.pid

    def console(self, machine: str) -> Console:
        """Attach to a machine's console."""
        return Console(self._socket, machine)

    def kill(self) -> None:
        """End it as a crash would; its machines go on."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Stop it, its machines too; harmless the second time."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(60)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def _wait_for_it(self) -> None:
        deadline = time.monotonic() + _READY_SECONDS
        while True:
            with socket.socket(socket.AF_UNIX) as probe:
                if probe.connect_ex(str(self._socket)) == 0:
                    return
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, self._log.read_text()
            # Nothing tells that a socket has appeared but looking again; its end would be seen here, too.
            select.select([], [], [], 0.02)


class Console(Closing):
    """Both ways of a machine's console, as docs/api.md has it.

    Attributes:
        seen: all that the guest printed so far.
    """

    def __init__(self, path: Path, machine: str) -> None:
        self.seen = b""
        self._connection = socket.socket(socket.AF_UNIX)
        try:
            self._connection.settimeout(_ANSWER_SECONDS)
            self._connection.connect(str(path))
            asked = f"GET /v1/machines/{machine}/console HTTP/1.1\r\nHost: kvmd\r\nConnection: upgrade\r\n"
            self._connection.sendall(f"{asked}Upgrade: kvmd-console\r\n\r\n".encode())
            header = b""
            while b"\r\n\r\n" not in header:
                data = self._connection.recv(65536)
                assert data, header
                header += data
            first, _, self.seen = header.partition(b"\r\n\r\n")
            assert first.startswith(b"HTTP/1.1 101 "), header
        except BaseException:
            self._connection.close()
            raise

    def read_until(self, text: bytes, *, seconds: float) -> None:
        """Read until the guest has printed the text.

        Raises:
            AssertionError: it did not in time, or it ended before.
        """
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            assert self._more(deadline), f"the guest ended before it printed {text!r}: {self._tail()}"

    def read_to_end(self, *, seconds: float) -> bytes:
        """Return all that the guest printed, once it has ended."""
        deadline = time.monotonic() + seconds
        while self._more(deadline):
            pass
        return self.seen

    def type(self, text: bytes) -> None:
        """Send what somebody types."""
        self._connection.sendall(text)

    def close(self) -> None:
        """Detach."""
        self._connection.close()

    def _more(self, deadline: float) -> bool:
        readable, _, _ = select.select([self._connection], [], [], max(0.0, deadline - time.monotonic()))
        assert readable, f"the guest prints nothing more: {self._tail()}"
        data = self._connection.recv(65536)
        self.seen += data
        return bool(data)

    def _tail(self) -> str:
        return self.seen[-2000:].decode(errors="replace")


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("kvmd", timeout=_ANSWER_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))
