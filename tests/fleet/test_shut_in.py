"""The daemon and machines' processes with what their units leave to them: RestrictAddressFamilies=.

The whole of the sandbox is tried in the lab (tests/lab/test_systemd.py); this part of it holds everywhere.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fleet.conftest import Site
from tests.fleet.test_commands import ask, daemon, end, socket_of

UNITS = Path(__file__).parents[2] / "systemd"


def shut_in(unit: str) -> list[str]:
    """Return the command before another one that leaves it what a unit leaves it."""
    (families,) = re.findall(r"(?m)^RestrictAddressFamilies=(.*)$", (UNITS / unit).read_text(encoding="utf-8"))
    # As a file, not as a module: it must run wherever the daemon is started.
    return [sys.executable, str(Path(__file__).with_name("only_address_families.py")), ",".join(families.split())]


def test_other_sockets_cannot_be_made() -> None:
    program = "import socket; socket.socket(socket.AF_UNIX); socket.if_nameindex()"
    done = subprocess.run(  # noqa: S603 - our own interpreter
        [*shut_in("kvmd.service"), sys.executable, "-c", program], stderr=subprocess.PIPE, check=False, timeout=60
    )
    assert b"Address family not supported by protocol" in done.stderr.splitlines()[-1]


@pytest.mark.kvm
def test_the_daemon_and_its_machines_need_no_other_sockets(kvm_site: Site) -> None:
    assert shut_in("kvmd.service") == shut_in("kvmd-machine@.service")
    with daemon(kvm_site, "--stop-machines", around=shut_in("kvmd.service")) as process:
        path = socket_of(kvm_site)
        status, answer = ask(path, "POST", "/v1/machines", {"image": "builtin:echo", "name": "echo", "memory": "4M"})
        assert (status, answer["state"]) == (201, "created")
        assert ask(path, "POST", "/v1/machines/echo/start")[0] == 200
        end(process)
