"""Mistakes of the operator's, and what kvmctl makes of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kvmd.ctl.main import COMMANDS
from kvmd.ctl.statuses import Status
from kvmd.stop import ExitStatus
from tests.ctl.conftest import Kvmctl
from tests.ctl.running import environment
from tests.ctl.serving import SECONDS, Daemon


@pytest.fixture
def one(kvmctl: Kvmctl, daemon: Daemon) -> str:
    del daemon
    assert kvmctl("create", "builtin:hello", "--name", "one").status == 0
    return "one"


def test_the_statuses_are_kvmd_s() -> None:
    same = {"REQUEST": "CONFIG", "UNREACHABLE": "HOST"}
    for status in Status:
        if status >= 120:
            assert int(status) == int(ExitStatus[same.get(status.name, status.name)])


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_is_where_the_table_says_and_has_help(name: str, kvmctl: Kvmctl) -> None:
    outcome = kvmctl(name, "--help")
    assert outcome.status == 0
    for word in ("Exit status", "--socket", "--output", "120", "121"):
        assert word in outcome.out


def test_the_help_lists_the_commands(kvmctl: Kvmctl) -> None:
    out = kvmctl("--help").out
    assert all(f"\n  {name} " in out for name in COMMANDS)
    assert kvmctl("--version").out.startswith("kvmctl ")
    assert kvmctl().status == 120


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("strat", "one"), "No such command 'strat'"),
        (("start",), "Missing argument"),
        (("start", ""), "a machine's name is not empty"),
        (("ps", "--socket", ""), "the socket's path is empty"),
        (("create", "builtin:hello", "--memory", "64Q"), "'64Q' is not a size"),
        (("map", "one", "--gpa", "zero"), "write an address"),
        (("console", "one", "--detach-key", "q"), "is no key"),
        (("create", "none.toml"), "cannot read none.toml: No such file or directory"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_status_120(kvmctl: Kvmctl, arguments: tuple[str, ...], said: str) -> None:
    outcome = kvmctl(*arguments)
    assert outcome.status == 120
    assert outcome.err.startswith("kvmctl: error: ")
    assert said in outcome.err
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"image = ", "not TOML"),
        (b"\xff", "not TOML"),
        (b"vcpus = 1", "image is missing"),
        (b'image = "builtin:hello"\nmemory = "64Q"', "is not a size"),
        (b'image = "builtin:hello"\nvcpus = 1979-05-27', "a date or time, which no key of a machine takes"),
        (b'image = "builtin:hello"\nvcpus = nan', "not JSON compliant"),
        (b'image = "builtin:hello"\ncolour = 1', "colour"),
        (b'image = "builtin:hello"\nname = "../x"', "name"),
        (b"x = " + b"[" * 10_000, "not TOML"),
    ],
)
def test_a_wrong_file_is_one_line(kvmctl: Kvmctl, daemon: Daemon, tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "spec.toml"
    file.write_bytes(content)
    outcome = kvmctl("create", str(file))
    assert outcome.status == 120
    assert said in outcome.err
    assert outcome.err.count("\n") == 1
    assert daemon.do(daemon.fleet.machines) == []


def test_did_you_mean(kvmctl: Kvmctl, one: str) -> None:
    for command in ("start", "inspect", "wait", "map", "logs", "conversions", "events", "rm"):
        outcome = kvmctl(command, "onee")
        assert outcome.status == 120, command
        assert outcome.err == "kvmctl: error: there is no machine onee: did you mean one?\n"
    assert "there are one" in kvmctl("start", "completely-different").err
    assert kvmctl("rm", one).status == 0
    assert "there are none at all" in kvmctl("start", "one").err


def test_another_state_is_needed(kvmctl: Kvmctl, one: str) -> None:
    outcome = kvmctl("pause", one)
    assert outcome.status == 120
    assert outcome.err == (
        "kvmctl: error: one: cannot pause: needs a machine that is running, this one is created "
        "(kvmctl start runs it)\n"
    )
    kvmctl("kill", one)
    assert "a machine starts once" in kvmctl("start", one).err
    error = json.loads(kvmctl("start", one, "-o", "json").err)
    assert (error["type"], error["needed"], error["found"], error["machine"]) == (
        "urn:kvmd:problem:wrong-state",
        "created",
        "stopped",
        "one",
    )


def test_a_failure_keeps_nobody_from_the_others(kvmctl: Kvmctl, one: str) -> None:
    outcome = kvmctl("start", "none", one, one)
    assert (outcome.status, outcome.out) == (120, "one\n")
    assert "there is no machine none" in outcome.err


def test_rm_force(kvmctl: Kvmctl, daemon: Daemon, one: str) -> None:
    kvmctl("start", one)
    assert "rm --force does both" in kvmctl("rm", one).err
    assert kvmctl("rm", "--force", one, "never-was").out == "one\nnever-was\n"
    assert daemon.do(daemon.fleet.machines) == []


def test_a_stop_and_a_wait_that_are_over_first(kvmctl: Kvmctl, daemon: Daemon, one: str) -> None:
    kvmctl("start", one)
    daemon.guest(one, lambda guest: setattr(guest, "stubborn", True))
    outcome = kvmctl("stop", "-t", "0", one)
    assert (outcome.status, outcome.err) == (1, "kvmctl: one is still running: kvmctl kill ends it at once\n")
    assert kvmctl("wait", "-t", "0", one).status == 1
    assert kvmctl("wait", "-t", "0", one, "-o", "json").json["reached"] is False


def test_a_name_that_is_taken(kvmctl: Kvmctl, one: str) -> None:
    outcome = kvmctl("create", "builtin:hello", "--name", one)
    assert outcome.status == 120
    assert "already" in outcome.err


def test_names_that_are_none(kvmctl: Kvmctl, one: str) -> None:
    del one
    for name in ("a/b", "..", "%2f", "a b", "ü", "\udc80"):
        outcome = kvmctl("inspect", name)
        assert outcome.status == 120, name
        assert outcome.err.count("\n") == 1


PATIENT = f"""
from kvmd.ctl import main, session
session.COMPLETION_SECONDS = {SECONDS}
main.main()
"""
"""Kvmctl, but for one thing: nobody waits at a keyboard, so there is more than a second for what could be meant."""


def completed(path: Path, line: str) -> list[str]:
    found = subprocess.run(  # noqa: S603 - ours
        [sys.executable, "-c", PATIENT],
        env={
            **environment(path),
            "_KVMCTL_COMPLETE": "bash_complete",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(line.split(" ")) - 1),
        },
        capture_output=True,
        check=False,
    )
    assert found.stderr == b""
    return [each.partition(",")[2] for each in found.stdout.decode().split()]


def test_completion(kvmctl: Kvmctl, daemon: Daemon, one: str) -> None:
    kvmctl("create", "builtin:hello", "--name", "two")
    kvmctl("start", "two")
    path = daemon.path
    assert completed(path, "kvmctl conv") == ["conversions"]
    assert completed(path, "kvmctl inspect ") == [one, "two"]
    assert completed(path, "kvmctl start ") == [one]
    assert completed(path, "kvmctl pause t") == ["two"]
    assert completed(path, f"kvmctl --socket {path} stop ") == ["two"]
    daemon.stop()
    assert completed(path, "kvmctl inspect ") == []
    assert "_KVMCTL_COMPLETE" in kvmctl("completion", "zsh").out


def test_a_plain_command_imports_nothing_heavy(daemon: Daemon) -> None:
    code = (
        "import sys; from kvmd.ctl.main import run_cli; run_cli(['ps']); "
        "print(*sorted({'rich', 'trio', 'structlog', 'fastapi', 'pydantic', 'msgspec', 'ssl', 'asyncio'} "
        "& sys.modules.keys()))"
    )
    found = subprocess.run(  # noqa: S603 - ours
        [sys.executable, "-c", code], env=environment(daemon.path), capture_output=True, check=True, text=True
    )
    assert found.stdout.splitlines()[-1] == ""
    assert found.stdout.startswith("NAME")
