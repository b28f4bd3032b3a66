"""The agent, the balloon and the power button of a real Linux guest, by the command line and the API of a daemon."""

from __future__ import annotations

import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.gate import Facility, require_whole
from tests.linux_guest.daemon import Daemon
from tests.linux_guest.initrd import Member, cpio
from tests.linux_guest.kernels import lab_kernel

pytestmark = [pytest.mark.linux_guest, pytest.mark.private_memory]

SECONDS = 3600.0
"""A guest that stands still is ended with its lab (LAB_TIMEOUT), which is not taken for a failure of kvmd's."""
MIB = 1 << 20


def initrd(folder: Path) -> bytes:
    require_whole(Facility.COMPILER)
    init = folder / "init"
    source = Path(__file__).with_name("agent_init.c")
    subprocess.run(["gcc", "-static", "-O1", "-Wall", "-Werror", "-o", init, source], check=True)  # noqa: S603, S607 - ours
    folders = (Member(name, stat.S_IFDIR | 0o755) for name in ("dev", "proc", "sys"))
    console = Member("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    return cpio([*folders, console, Member("init", stat.S_IFREG | 0o755, init.read_bytes())])


# One guest for all of it: a start takes half a minute in the lab.
def test_the_agent_answers_memory_comes_back_and_the_button_shuts_down(tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    (files / "initrd").write_bytes(initrd(tmp_path))
    shutil.copy(lab_kernel().image, files / "kernel")

    command = [sys.executable, "-c", "from kvmd.ctl.main import main; main()"]
    socket = ["--socket", str(tmp_path / "api")]

    def kvmctl(*arguments: str) -> None:
        subprocess.run([*command, *arguments, *socket], timeout=SECONDS, check=True)  # noqa: S603 - ours

    def told(said: str) -> str:
        asking = [*command, "agent", "guest", "-t", "0", *socket]
        with subprocess.Popen(asking, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as agent:  # noqa: S603 - ours
            assert agent.stdin is not None
            assert agent.stdout is not None
            agent.stdin.write(said)
            agent.stdin.flush()
            answer = agent.stdout.readline()
            agent.stdin.close()
            assert agent.stdout.read() == ""
        assert agent.returncode == 0
        return answer

    with Daemon(tmp_path, images=[files]) as daemon:
        wanted = {"kernel": "kernel", "initrd": "initrd", "cmdline": "console=ttyS0 quiet", "memory": "256M"}
        devices = {"agent": "kvmd.agent", "balloon": True, "balloon_target": "32M"}
        daemon.ask("POST", "/v1/machines", {"name": "guest", **wanted, **devices})
        with daemon.console("guest") as console:
            daemon.ask("POST", "/v1/machines/guest/start")
            console.read_until(b"agent: port there, button there", seconds=SECONDS)

            for _ in range(2):  # each conversation from its first byte on
                assert told("hello\n") == "hello from the guest\n"

            def until_actual(target: int) -> dict[str, int]:
                deadline = time.monotonic() + SECONDS
                while (balloon := daemon.ask("GET", "/v1/machines/guest/balloon"))["actual"] != target:
                    assert time.monotonic() < deadline, balloon
                return dict(balloon)

            assert until_actual(32 * MIB)["given_back"] >= 32 * MIB
            free = int(told("free\n"))
            kvmctl("balloon", "guest", "96M")
            until_actual(96 * MIB)
            assert int(told("free\n")) <= free - 50  # of 64, and the guest frees some by itself

            # What the guest frees by itself comes back by reports of free pages, which Linux makes some seconds later.
            kvmctl("balloon", "guest", "0")
            until_actual(0)
            before = daemon.ask("GET", "/v1/machines/guest/balloon")
            assert told("use 64\n") == "used\n"
            deadline = time.monotonic() + SECONDS
            while True:
                # What the balloon let go before is reported, too, and was not held.
                after = daemon.ask("GET", "/v1/machines/guest/balloon")
                if after["given_back"] - before["given_back"] >= 32 * MIB and after["held"] < before["held"] + 40 * MIB:
                    break
                assert time.monotonic() < deadline, (before, after)

            kvmctl("stop", "guest", "--timeout", str(SECONDS))
            assert b"agent: the power button was pressed" in console.read_to_end(seconds=SECONDS)
        end = daemon.ask("GET", "/v1/machines/guest")["end"]
        assert (end["reason"], end["status"]) == ("guest-power-off", 0)
