"""The driver of the daemon, on a guest that needs no Linux: so a failure with Linux is not the driver's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.linux_guest.daemon import Daemon

SECONDS = 60.0


@pytest.mark.kvm
def test_a_machine_is_created_driven_by_its_console_and_waited_for(tmp_path: Path) -> None:
    with Daemon(tmp_path) as daemon:
        assert daemon.ask("POST", "/v1/machines", {"name": "echo", "image": "builtin:echo"})["state"] == "created"
        with daemon.console("echo") as console:
            daemon.ask("POST", "/v1/machines/echo/start")
            console.type(b"hello")
            console.read_until(b"hello", seconds=SECONDS)
            console.type(b"q")
            assert b"hello" in console.read_to_end(seconds=SECONDS)
        ended = daemon.ask("GET", "/v1/machines/echo/wait?state=stopped&timeout=60")
        assert ended["reached"] is True
        assert ended["machine"]["end"]["status"] == 0
        with pytest.raises(AssertionError, match="unknown-machine"):
            daemon.ask("GET", "/v1/machines/nobody")
        daemon.ask("DELETE", "/v1/machines/echo")


def test_a_daemon_that_does_not_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("no folder")
    with pytest.raises(AssertionError, match=r"Directory .* is a file"):
        Daemon(tmp_path)
