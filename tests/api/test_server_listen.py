from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from kvmd.api.server.listen import listening
from kvmd.errors import ConfigError, HostError


async def test_the_socket_has_its_mode_and_goes_away(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with listening(path, group=os.getegid()):
        found = path.stat()
        assert stat.S_ISSOCK(found.st_mode)
        assert stat.S_IMODE(found.st_mode) == 0o660
        assert found.st_gid == os.getegid()
        await (await trio.open_unix_socket(path)).aclose()
    assert not path.exists()


def test_a_stale_socket_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(os.fspath(path))
    assert path.exists()
    with listening(path):
        pass


def test_a_socket_that_somebody_listens_on_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(os.fspath(path))
        other.listen()
        with pytest.raises(ConfigError, match="somebody listens on"), listening(path):
            pass
    assert path.exists()


def test_a_second_daemon_is_told_so(tmp_path: Path) -> None:
    # The lock is between processes, so the first daemon must be one; it has not bound its socket yet.
    path = tmp_path / "s"
    hold = (
        "import os, sys\n"
        "fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o600)\n"
        "os.lockf(fd, os.F_TLOCK, 0)\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(  # noqa: S603 - a program of ours
        [sys.executable, "-c", hold, f"{path}.lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == b"held\n"
        with pytest.raises(ConfigError, match="another kvmd listens on"), listening(path):
            pass
    with listening(path):
        pass


def test_a_socket_that_was_replaced_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with listening(path):
        path.unlink()
        path.write_text("somebody else's", encoding="utf-8")
    assert path.exists()


def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("precious", encoding="utf-8")
    with pytest.raises(ConfigError, match="is there and is no socket"), listening(path):
        pass
    assert path.read_text(encoding="utf-8") == "precious"


def test_a_path_that_is_too_long_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="too long: Linux allows 107 bytes"), listening(tmp_path / ("s" * 108)):
        pass


def test_a_folder_that_is_missing_is_told(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="No such file or directory"), listening(tmp_path / "none" / "s"):
        pass
