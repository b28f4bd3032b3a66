"""The daemons that machines over HTTP are measured with."""

import json
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from kvmd.benchmark import post


@pytest.mark.kvm
@pytest.mark.parametrize("run", [post.daemon, post.daemon_with_pool])
def test_a_daemon_prints_nothing_among_the_results(
    run: Callable[[Path], AbstractContextManager[Path]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with run(tmp_path) as path:
        assert path.is_socket()
    assert capfd.readouterr().out == ""


@pytest.mark.kvm
def test_an_idle_machine_has_run(tmp_path: Path) -> None:
    with post.daemon(tmp_path) as path:
        pid = post.Client(path).create_idle("idle")
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
            connection.sendall(b"GET /v1/machines/idle HTTP/1.1\r\nHost: kvmd\r\nConnection: close\r\n\r\n")
            found = json.loads(connection.makefile("rb").read().partition(b"\r\n\r\n")[2])
    assert (found["state"], found["pid"]) == ("paused", pid)
    assert found["started"] is not None
