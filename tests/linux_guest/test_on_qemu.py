"""Our init and its surroundings, on a hypervisor that is known to be right: so a failure on kvmd is kvmd's."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmd.network.networks import open_networks
from kvmd.network.spec import NetworkSpec
from tests.linux_guest.debian import Kernel
from tests.linux_guest.kernels import debian_kernel, lab_kernel
from tests.linux_guest.proof import BRIDGE, HOST, PREFIX, Proof, run_to_end
from tests.linux_guest.qemu import QemuNetwork, microvm
from tests.own_network import own_network

pytestmark = pytest.mark.network

SECONDS = 600.0
QEMU = "qemu-system-x86_64"


def prove(folder: Path, kernel: Kernel, accelerator: str, end: str, parameters: str = "") -> None:
    program = shutil.which(QEMU)
    if program is None:
        pytest.skip(f"there is no {QEMU}")
    bridge = NetworkSpec(kind="made-bridge", bridge=BRIDGE, addresses=(f"{HOST}/{PREFIX}",))
    with open_networks([bridge], machine="proof") as networks:
        (network,) = networks.guest
        os.set_blocking(network.tap.fd, True)
        with Proof(folder, kernel, end=end) as proof:
            command = microvm(
                program=program,
                kernel=proof.kernel,
                initrd=proof.initrd,
                cmdline=f"{proof.cmdline} {parameters}",
                accelerator=accelerator,
                disk=proof.disk,
                network=QemuNetwork(network.tap.fd, network.mac.hex(":")),
            )
            ended = run_to_end(command, pass_fds=(network.tap.fd,), seconds=SECONDS)
        assert ended.status == 0, ended.errors
        report = proof.check(ended.console)
        assert report["net"] == f"mtu 1500 mac {network.mac.hex()}"


@own_network
def test_the_lab_s_kernel_finds_everything_as_it_should(tmp_path: Path) -> None:
    # Without KVM there is no ACPI in QEMU's microvm that Linux gets along with, and so no power to switch off.
    # Reboot is by a triple fault: left to itself Linux jumps to the reset vector, the firmware there loads the kernel
    # once more on one processor without resetting the other, and one time in twelve that got nowhere.
    prove(tmp_path, lab_kernel(), "tcg", "reboot", "reboot=t")


@pytest.mark.private_memory  # the lab's KVM, where guest kernels run natively
@pytest.mark.parametrize("kernel", [lab_kernel, debian_kernel])
@own_network
def test_both_kernels_on_nested_kvm(tmp_path: Path, kernel: Callable[[], Kernel]) -> None:
    prove(tmp_path, kernel(), "kvm", "poweroff")
