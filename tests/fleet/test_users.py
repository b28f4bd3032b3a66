"""kvmctl as operators, viewers and strangers, real users all of them, at the socket of a real daemon."""

from __future__ import annotations

import grp
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvmd.guests import GUESTS
from tests.fleet.conftest import Site
from tests.fleet.test_commands import SECONDS, daemon_of

pytestmark = [
    pytest.mark.kvm,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root may become somebody else"),
]

UID = 54321
"""A user that no host knows by name, and that owns nothing."""

BECOME = """
import importlib, json, os, pkgutil, sys
import kvmd.ctl
# The user may not be able to read where kvmd or Python lies: what is imported late is imported now.
late = ("difflib", "encodings.idna", "encodings.utf_8_sig", "kvmd.picture", "kvmd.toml_file", "traceback")
for name in (*(module.name for module in pkgutil.walk_packages(kvmd.ctl.__path__, "kvmd.ctl.")), *late):
    importlib.import_module(name)
from kvmd.ctl.main import run_cli
uid, groups, commands = map(json.loads, sys.argv[1:])
os.setgroups(groups)
os.setgid(uid)
os.setuid(uid)
assert os.geteuid() == os.getegid() == uid and os.getgroups() == groups
outcomes = []
for command in commands:
    # Their output is some lines: pipes take it.
    pipes = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        for to, (_, writable) in enumerate(pipes, 1):
            os.dup2(writable, to)
        status = run_cli(command)
        sys.stdout.flush()
        os._exit(status)
    for _, writable in pipes:
        os.close(writable)
    texts = [os.fdopen(readable).read() for readable, _ in pipes]
    outcomes.append((os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), *texts))
print(json.dumps(outcomes))
"""

OPERATORS, VIEWERS = [group for group in grp.getgrall() if group.gr_gid][:2]


@dataclass(frozen=True)
class Outcome:
    status: int
    out: str
    err: str


@dataclass(frozen=True)
class Place:
    """Where the daemon listens."""

    folder: Path

    @property
    def socket(self) -> Path:
        return self.folder / "kvmd.sock"

    @property
    def view(self) -> Path:
        return self.folder / "view.sock"

    def kvmctl(self, groups: list[int], *commands: Sequence[str], path: Path | None = None) -> list[Outcome]:
        """Call kvmctl as somebody in these groups: a process for each command."""
        done = subprocess.run(  # noqa: S603 - our own interpreter
            [sys.executable, "-c", BECOME, *map(json.dumps, (UID, groups, commands))],
            env={**os.environ, "KVMD_SOCKET": str(path or self.socket)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            timeout=SECONDS,
            check=True,
        )
        outcomes = [Outcome(*found) for found in json.loads(done.stdout)]
        assert not any("Traceback" in outcome.err for outcome in outcomes), outcomes
        return outcomes


@pytest.fixture
def place(kvm_site: Site) -> Iterator[Place]:
    """Serve at sockets in a folder that everybody may enter."""
    # Not in pytest's own: nobody else may enter that.
    folder = Path(tempfile.mkdtemp(prefix="kvmdtest-"))
    folder.chmod(0o755)
    place = Place(folder)
    config = f"""
[api]
socket = "{place.socket}"
operators = "{OPERATORS.gr_name}"
viewers = "{VIEWERS.gr_name}"
viewers_socket = "{place.view}"

[images]
folders = ["{folder}/images"]
"""
    (folder / "images").mkdir()
    try:
        with daemon_of(kvm_site, config, "--stop-machines"):
            yield place
    finally:
        shutil.rmtree(folder)


def test_an_operator_may_do_everything(place: Place) -> None:
    actions = [(action, "one") for action in ("start", "pause", "resume", "kill", "rm")]
    created, inspected, *acted, ran = place.kvmctl(
        [OPERATORS.gr_gid],
        ("create", "builtin:echo", "--name", "one"),
        ("inspect", "one", "-o", "json"),
        *actions,
        ("run", "builtin:hello"),
    )
    assert created == Outcome(0, "one\n", "")
    assert json.loads(inspected.out)[0]["owner_uid"] == UID
    assert acted == [Outcome(0, "one\n", "")] * len(actions)
    assert ran.status == 0
    assert ran.out.startswith("hello from a machine")


def test_an_operator_s_files_are_those_that_the_operator_may_open(place: Place) -> None:
    image, allowed = place.folder / "guest.elf", place.folder / "images" / "guest.elf"
    for path in (image, allowed):
        shutil.copy(GUESTS["echo"].path, path)
        path.chmod(0o600)
    refused, created = place.kvmctl([OPERATORS.gr_gid], ("create", str(image)), ("create", str(allowed)))
    # The daemon is root and might read it; but it opens nothing outside of its folders, and the caller cannot.
    assert refused.status == 120
    assert "cannot open the image" in refused.err
    assert "Permission denied" in refused.err
    assert created.status == 0
    os.chown(image, UID, UID)
    assert place.kvmctl([OPERATORS.gr_gid], ("create", str(image)))[0].status == 0


LOOKING = (
    ("ps",),
    ("check",),
    ("inspect", "one"),
    ("wait", "one", "--for", "created"),
    ("logs", "one"),
    ("logs", "--console", "one"),
    ("conversions", "one"),
    ("map", "one"),
    ("top", "-n", "1", "-i", "0.05"),
)
CHANGING = (
    ("create", "builtin:hello"),
    ("run", "builtin:hello"),
    ("start", "one"),
    ("pause", "one"),
    ("resume", "one"),
    ("stop", "one"),
    ("kill", "one"),
    ("rm", "one"),
    ("console", "one"),
)


def test_a_viewer_may_look_and_change_nothing(place: Place) -> None:
    place.kvmctl([OPERATORS.gr_gid], ("create", "builtin:echo", "--name", "one"))
    outcomes = place.kvmctl([VIEWERS.gr_gid], *LOOKING, *CHANGING, ("ps", "-o", "json"), path=place.view)
    for command, outcome in zip(LOOKING, outcomes, strict=False):
        assert (outcome.status, outcome.err) == (0, ""), command
    for command, outcome in zip(CHANGING, outcomes[len(LOOKING) :], strict=False):
        assert outcome.status == 121, (command, outcome)
        assert f"user {UID} may look, but not" in outcome.err
    assert [machine["state"] for machine in json.loads(outcomes[-1].out)["machines"]] == ["created"]
    # The operators' door is closed to them, and kvmctl says so.
    (outcome,) = place.kvmctl([VIEWERS.gr_gid], ("ps",))
    assert outcome.status == 121
    assert "you may not open kvmd's socket" in outcome.err


def test_a_stranger_may_do_nothing(place: Place) -> None:
    for path in (place.socket, place.view):
        (outcome,) = place.kvmctl([], ("ps",), path=path)
        assert outcome.status == 121
        assert "you may not open kvmd's socket" in outcome.err
        # Where the file would let them in, the daemon does not.
        path.chmod(0o666)
        for outcome in place.kvmctl([], ("ps",), ("check",), ("create", "builtin:hello"), path=path):
            assert outcome.status == 121
            assert f"user {UID} is neither in the operators' group nor in the viewers'" in outcome.err
