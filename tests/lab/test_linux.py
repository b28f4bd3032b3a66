"""A Linux guest by ``kvmd run``, whose memory could turn private.

Init and its surroundings are those of tests/linux_guest/test_on_qemu.py: a failure here alone is kvmd's.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kvmd.network.networks import open_networks
from kvmd.network.spec import NetworkSpec
from tests.linux_guest.debian import Kernel
from tests.linux_guest.kernels import lab_kernel, unpacked
from tests.linux_guest.proof import BRIDGE, HOST, PREFIX, Proof, as_toml, run_to_end
from tests.own_network import own_network

pytestmark = [pytest.mark.linux_guest, pytest.mark.private_memory, pytest.mark.network]

SECONDS = 3600.0  # as in test_guest_devices.py


def prove(folder: Path, kernel: Kernel, *, vcpus: int, end: str = "poweroff", **keys: str) -> tuple[int, str]:
    """Return the exit status and the log, once everything that the guest did is seen to be right."""
    bridge = NetworkSpec(kind="made-bridge", bridge=BRIDGE, addresses=(f"{HOST}/{PREFIX}",))
    with open_networks([bridge], machine="proof"), Proof(folder, kernel, end=end, console=False) as proof:
        machine = {**keys, **proof.machine("guest", vcpus=vcpus)}
        spec = folder / "machine.toml"
        spec.write_text(as_toml(machine))
        command = [sys.executable, "-m", "kvmd", "run", str(spec), "--log-format", "json"]
        ended = run_to_end(command, seconds=SECONDS)
    proof.check(ended.console, vcpus=vcpus)
    return ended.status, ended.errors


@own_network
def test_private_memory_does_not_disturb_a_kernel_that_never_asks_for_it(tmp_path: Path) -> None:
    # As an ELF file: tests/lab/test_linux_guest.py starts it as it is.
    kernel = unpacked(lab_kernel(), tmp_path)
    status, log = prove(tmp_path, kernel, vcpus=1, end="reboot", protection="guest-memfd")
    assert status == 133
    assert '"reason":"guest-reboot"' in log
    assert '"vm_type":"KVM_X86_SW_PROTECTED_VM"' in log
    assert '"boot_protocol":"pvh"' in log
