"""For all tests of kvmctl: a daemon, and a way to call kvmctl in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kvmd.ctl.main import run_cli
from tests.ctl.serving import Daemon, daemon_at


@dataclass(frozen=True)
class Outcome:
    """What a command came to."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def lines(self) -> list[Any]:
        """JSON lines."""
        return [json.loads(line) for line in self.out.splitlines()]


Kvmctl = Callable[..., Outcome]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    """Yield a daemon that runs."""
    with daemon_at(tmp_path / "kvmd.sock") as running:
        yield running


@pytest.fixture
def kvmctl(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Kvmctl:
    """Return what calls kvmctl, with the socket of ``daemon``, and returns what it came to."""
    monkeypatch.setenv("KVMD_SOCKET", str(tmp_path / "kvmd.sock"))

    def call(*arguments: str) -> Outcome:
        capfd.readouterr()
        status = run_cli(arguments)
        captured = capfd.readouterr()
        return Outcome(status, captured.out, captured.err)

    return call
