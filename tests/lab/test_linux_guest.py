"""A Linux guest, all of it, driven by the daemon's API: boot, processors, disk, network, console, and its end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kvmd.network.networks import open_networks
from kvmd.network.spec import NetworkSpec
from tests.linux_guest.daemon import Daemon
from tests.linux_guest.debian import Kernel
from tests.linux_guest.kernels import debian_kernel, lab_kernel
from tests.linux_guest.proof import BRIDGE, HOST, LISTENING, PREFIX, TYPED, Proof
from tests.own_network import own_network

pytestmark = [pytest.mark.linux_guest, pytest.mark.kvm, pytest.mark.private_memory, pytest.mark.network]

SECONDS = 3600.0  # as in test_guest_devices.py


@pytest.mark.parametrize("kernel", [lab_kernel, debian_kernel])
@own_network
def test_a_linux_guest_is_useful(tmp_path: Path, kernel: Callable[[], Kernel]) -> None:
    found = kernel()
    bridge = NetworkSpec(kind="made-bridge", bridge=BRIDGE, addresses=(f"{HOST}/{PREFIX}",))
    # A machine of another kvmd's on the same bridge: it makes it, and keeps it there for the peer.
    with open_networks([bridge], machine="keeper"), Proof(tmp_path, found) as proof:
        with Daemon(tmp_path, images=[tmp_path, found.image.parent], bridges=[BRIDGE]) as daemon:
            daemon.ask("POST", "/v1/machines", proof.machine("linux"))
            with daemon.console("linux") as console:
                daemon.ask("POST", "/v1/machines/linux/start")
                console.read_until(LISTENING, seconds=SECONDS)
                console.type(TYPED + b"\n")
                printed = console.read_to_end(seconds=SECONDS)
            ended = daemon.ask("GET", "/v1/machines/linux/wait?state=stopped&timeout=60")
            assert ended["machine"]["end"]["status"] == 0, ended
        proof.close()
        proof.check(printed)
