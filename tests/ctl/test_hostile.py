"""What answers on the socket may be anything: nothing hangs, nothing grows, nothing reaches the terminal."""

from __future__ import annotations

import base64
import json
import os
import socket
from pathlib import Path

import pytest

from kvmd.ctl import client
from tests.ctl.conftest import Kvmctl
from tests.ctl.running import on_terminal, with_pipes
from tests.ctl.serving import Daemon, http, stranger

PROBLEM = "application/problem+json"
EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "kvmd.sock"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"", "closed the connection without an answer"),
        (b"HTTP/1.1 200 OK\r\nContent-Le", "its answer has no machines"),
        (b"HTTP/1.0 200 OK\r\n\r\n{}", "its answer has no machines"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "does not speak HTTP"),
        (b"\x00\xff\xfe", "does not speak HTTP"),
        (b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200 + b"\r\n", "does not speak HTTP"),
        (b"HTTP/1.1 200 OK\r\nA: " + b"b" * 100_000 + b"\r\n\r\n", "does not speak HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{}", "stopped in the middle"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk(b"{}"), "stopped in the middle"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "stopped in the middle"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n" + b"x" * 100, "kvmd"),
        (http(b"<html>", kind="text/html"), "does not send JSON"),
        (http(b"[" * 100_000), "does not send JSON"),
        (http(b"9" * 10_000), "does not send JSON"),
        (http(b"{}"), "has no machines"),
        (http(b"[]"), "has no machines"),
        (http(b'{"machines": 7}'), "has no machines"),
        (http(b'{"machines": [7]}'), "has no machines"),
        (http(b"not here", status="404 Not Found", kind="text/plain"), "it said 404 and no more"),
        (http(b'{"type": "about:blank"}', status="404 Not Found", kind=PROBLEM), "it said 404 and no more"),
        (http(b"[]", status="500 No", kind=PROBLEM), "it said 500 and no more"),
        (http(b"", status="302 Found", more="Location: http://elsewhere/\r\n"), "has no machines"),
    ],
)
def test_what_is_not_kvmd_is_one_line(kvmctl: Kvmctl, path: Path, answer: bytes, said: str) -> None:
    with stranger(path, answer):
        outcome = kvmctl("ps")
    assert said in outcome.err
    assert outcome.err.count("\n") == 1
    assert outcome.err.startswith("kvmctl: error: ")
    assert outcome.status in {121, 125}
    assert outcome.out == ""


def test_an_answer_without_an_end_is_cut(kvmctl: Kvmctl, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "ANSWER_LIMIT", 1 << 20)
    with stranger(path, b"HTTP/1.1 200 OK\r\n\r\n" + b" " * (2 << 20)):
        outcome = kvmctl("ps")
    assert "more than 1 MiB" in outcome.err
    assert outcome.status == 125


def test_a_server_that_says_nothing(kvmctl: Kvmctl, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.Client._ask, "__kwdefaults__", {"body": None, "files": (), "seconds": 0.05})
    monkeypatch.setattr(client.Client.get, "__kwdefaults__", {"seconds": 0.05})
    with stranger(path, b"HTTP/1.1 200 OK\r\n", hold=True):
        outcome = kvmctl("ps")
    assert "does not answer" in outcome.err
    assert outcome.status == 121


def test_an_answer_that_says_it_is_the_last_is_read(kvmctl: Kvmctl, path: Path) -> None:
    with stranger(path, http(b'{"machines": []}', more="Connection: close\r\n")):
        assert kvmctl("ps", "-o", "json").json == {"machines": []}


@pytest.mark.parametrize(
    "stream",
    [
        chunk(b"id: 1\nevent: lifecycle\ndata: no json\n\n"),
        chunk(b"data: [1]\n\n"),
        chunk(b"data: " + b"x" * (2 << 20)),
        chunk(b"data: xxxxxxx\n" * (1 << 18)),
    ],
)
def test_a_stream_that_is_not_kvmd_s(kvmctl: Kvmctl, path: Path, stream: bytes) -> None:
    with stranger(path, EVENTS + stream):
        outcome = kvmctl("events")
    assert "the stream has an event that" in outcome.err
    assert outcome.status == 125


def test_an_upgrade_to_something_else(kvmctl: Kvmctl, path: Path) -> None:
    other = b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
    with stranger(path, other):
        outcome = kvmctl("console", "one")
    assert "speaks another protocol" in outcome.err
    assert outcome.status == 125


def test_nothing_that_a_server_says_reaches_the_terminal(path: Path) -> None:
    evil = "x\x1b]52;c;cm0gLXJm\x07\x9b2J\u202e\r\n"
    machine = {"name": evil, "state": evil, "spec": {"image": evil, "memory": evil}, "end": {"reason": evil}}
    document = json.dumps({"machines": [machine]}).encode()
    problem = json.dumps({"type": "urn:kvmd:problem:forbidden", "detail": evil, "found": evil}).encode()
    harmful = ("\x1b]", "\x07", "\x9b", "\u202e")
    for answer, arguments in (
        (http(document), ("ps",)),
        (http(document), ("ps", "-q")),
        (http(document), ("ps", "-o", "json")),
        (http(problem, status="403 No", kind=PROBLEM), ("ps",)),
        (http(problem, status="403 No", kind=PROBLEM), ("ps", "-o", "json")),
        (http(problem, status="403 No", kind=PROBLEM), ("start", evil)),
    ):
        with stranger(path, answer), on_terminal(path, *arguments) as kvmctl:
            kvmctl.wait()
            # Nothing is read before the end: the terminal must hold it all. It need not give it all at once.
            os.set_blocking(kvmctl.reading, False)
            seen = kvmctl.rest().decode()
        assert "52;c" in seen
        assert not any(each in seen for each in harmful), (arguments, seen)
        path.unlink()


# -- no daemon


def test_no_socket(kvmctl: Kvmctl, path: Path) -> None:
    outcome = kvmctl("ps")
    assert outcome.status == 121
    assert outcome.err == (
        f"kvmctl: error: kvmd is not running: there is no socket {path} "
        "(systemctl start kvmd.socket; or name another socket with --socket or KVMD_SOCKET)\n"
    )
    error = json.loads(kvmctl("ps", "-o", "json").err)
    assert error["type"] == "urn:kvmctl:problem:unreachable"


def test_a_socket_that_nobody_listens_on(kvmctl: Kvmctl, path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    assert f"nobody listens on {path}" in kvmctl("ps").err


def test_a_file_that_is_no_socket(kvmctl: Kvmctl, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert f"{file} is no socket" in kvmctl("ps", "--socket", str(file)).err
    assert f"{file} is no socket" in kvmctl("--socket", str(file), "ps").err


def test_a_path_that_is_too_long(kvmctl: Kvmctl) -> None:
    outcome = kvmctl("ps", "--socket", "/" + "x" * 200)
    assert outcome.status == 121
    assert "too long" in outcome.err


def test_a_socket_that_one_may_not_open(kvmctl: Kvmctl, daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(socket.socket):
        def connect(self, address: object) -> None:
            raise PermissionError(13, f"Permission denied: {address!r}")

    monkeypatch.setattr(socket, "socket", Refusing)
    outcome = kvmctl("ps")
    assert outcome.status == 121
    assert f"you may not open kvmd's socket {daemon.path}: it is open to the group " in outcome.err


def test_who_may_not_do_it_is_told(kvmctl: Kvmctl, path: Path) -> None:
    problem = b'{"type":"urn:kvmd:problem:forbidden","detail":"user 7 may look, but not change anything"}'
    with stranger(path, http(problem, status="403 Forbidden", kind=PROBLEM)):
        outcome = kvmctl("kill", "one")
    assert (outcome.status, outcome.err) == (
        121,
        "kvmctl: error: one: user 7 may look, but not change anything\n",
    )


def test_a_slow_reader_costs_no_memory(path: Path) -> None:
    output = (b"x" * 1023 + b"\n") * (32 << 10)
    events = [
        b'event: output\ndata: {"data":"%b"}\n\n' % base64.b64encode(output[at : at + 65536])
        for at in range(0, len(output), 65536)
    ]
    stream = b"".join([*events, b'event: end\ndata: {"ended":true}\n\n'])
    with (
        stranger(path, http(stream, kind="text/event-stream")),
        with_pipes(path, "logs", "--console", "-f", "one") as logs,
    ):
        # A few lines, and then nothing is read for as long as it takes to fill all pipes: the rest waits in the server.
        logs.until(b"x\n")
        before = peak_kib(logs.process.pid)
        seen = len(logs.until(b"x\n"))
        while seen < len(output) - (1 << 20):
            seen += len(os.read(logs.reading, 65536))
        assert peak_kib(logs.process.pid) < before + (8 << 10)
        logs.rest()
        assert logs.wait() == 0


@pytest.mark.parametrize("data", ['"x"', '"eHg=\\n"', "7", "null", '"\\ud800"'])
def test_output_that_is_none(kvmctl: Kvmctl, path: Path, data: str) -> None:
    event = f'event: output\ndata: {{"data":{data}}}\n\n'.encode()
    with stranger(path, http(event, kind="text/event-stream")):
        outcome = kvmctl("logs", "--console", "-f", "one")
    assert (outcome.status, outcome.out) == (125, "")
    assert outcome.err.count("\n") == 1


def peak_kib(pid: int) -> int:
    """Return the most memory that a process had at once (proc(5), VmHWM)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
