from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import structlog
import trio

from kvmd.cli.reload import Reloader
from kvmd.daemon_config import DaemonConfig, load_daemon_config
from kvmd.errors import ConfigError
from kvmd.service_manager import ServiceManager


class Manager(ServiceManager):
    """systemd's end, as a list."""

    def __init__(self) -> None:
        super().__init__({}, 0)
        self.said: list[str] = []

    def reloading(self) -> None:
        self.said.append("reloading")

    def ready(self, status: str) -> None:
        self.said.append(status)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "kvmd.toml"
    path.write_text("")
    return path


def taking(taken: list[DaemonConfig], *waiting: str) -> Callable[[DaemonConfig], Sequence[str]]:
    """Return what takes a configuration over, but for some keys."""

    def take(config: DaemonConfig) -> Sequence[str]:
        taken.append(config)
        return waiting

    return take


def test_what_cannot_be_taken_over_is_named(file: Path) -> None:
    manager = Manager()
    reloader = Reloader(file, DaemonConfig(), manager, [taking([], "api.viewers"), taking([])])
    with structlog.testing.capture_logs() as logs:
        reloader.reload()
    assert logs[0]["keys"] == ["api.viewers"]
    assert manager.said[1] == "configuration reloaded; 1 keys wait for a restart"


def test_what_the_first_refuses_nobody_takes_over(file: Path) -> None:
    manager, taken = Manager(), list[DaemonConfig]()

    def refuse(_config: DaemonConfig) -> Sequence[str]:
        raise ConfigError("there is no group x")

    Reloader(file, DaemonConfig(), manager, [refuse, taking(taken)]).reload()
    assert taken == []
    assert manager.said[1] == "configuration not reloaded: there is no group x"


def test_what_the_file_says_now_is_taken_over(file: Path) -> None:
    manager, taken = Manager(), list[DaemonConfig]()
    reloader = Reloader(file, load_daemon_config(file), manager, [taking(taken)])
    file.write_text('[machines]\nwaiting = 5\n[api]\nsocket = "/elsewhere"\n')
    with structlog.testing.capture_logs() as logs:
        reloader.reload()
    assert [config.machines.waiting for config in taken] == [5]
    assert manager.said == ["reloading", "configuration reloaded; 1 keys wait for a restart"]
    assert logs[0]["keys"] == ["api.socket"]


def test_a_file_that_cannot_be_meant_changes_nothing(file: Path) -> None:
    manager, taken = Manager(), list[DaemonConfig]()
    reloader = Reloader(file, DaemonConfig(), manager, [taking(taken)])
    file.write_text("[machines]\nwaiting = -5\n")
    reloader.reload()
    assert taken == []
    assert manager.said[1].startswith(f"configuration not reloaded: {file}: machines.waiting: -5")


async def test_sighup_reloads(file: Path) -> None:
    manager, taken = Manager(), trio.Event()

    def take(_config: DaemonConfig) -> list[str]:
        taken.set()
        return []

    reloader = Reloader(file, DaemonConfig(), manager, [take])
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            await nursery.start(reloader.run)
            os.kill(os.getpid(), signal.SIGHUP)
            await taken.wait()
            nursery.cancel_scope.cancel()
