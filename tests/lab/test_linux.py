"""Linux guests by ``kvmd run``: one whose memory could turn private, and one that panics.

Init and its surroundings are those of tests/linux_guest/test_on_qemu.py: a failure here alone is kvmd's.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from kvmd.network.networks import open_networks
from kvmd.network.spec import NetworkSpec
from tests.linux_guest.debian import Kernel
from tests.linux_guest.kernels import debian_kernel, lab_kernel, unpacked
from tests.linux_guest.proof import BRIDGE, HOST, PREFIX, Ended, Proof, as_toml, run_to_end, write_initrd
from tests.own_network import own_network

pytestmark = [pytest.mark.linux_guest, pytest.mark.private_memory, pytest.mark.network]

SECONDS = 3600.0  # as in test_guest_devices.py


def prove(folder: Path, kernel: Kernel, *, vcpus: int, end: str = "poweroff", **keys: str) -> tuple[int, str]:
    """Return the exit status and the log, once everything that the guest did is seen to be right."""
    bridge = NetworkSpec(kind="made-bridge", bridge=BRIDGE, addresses=(f"{HOST}/{PREFIX}",))
    with open_networks([bridge], machine="proof"), Proof(folder, kernel, end=end, console=False) as proof:
        ended = run(folder, {**keys, **proof.machine("guest", vcpus=vcpus)})
    proof.check(ended.console, vcpus=vcpus)
    return ended.status, ended.errors


def run(folder: Path, machine: dict[str, object]) -> Ended:
    spec = folder / "machine.toml"
    spec.write_text(as_toml(machine))
    return run_to_end([sys.executable, "-m", "kvmd", "run", str(spec), "--log-format", "json"], seconds=SECONDS)


@own_network
def test_private_memory_does_not_disturb_a_kernel_that_never_asks_for_it(tmp_path: Path) -> None:
    # As an ELF file: tests/lab/test_linux_guest.py starts it as it is.
    kernel = unpacked(lab_kernel(), tmp_path)
    status, log = prove(tmp_path, kernel, vcpus=1, end="reboot", protection="guest-memfd")
    assert status == 133
    assert '"reason":"guest-reboot"' in log
    assert '"vm_type":"KVM_X86_SW_PROTECTED_VM"' in log
    assert '"boot_protocol":"pvh"' in log


def test_a_stock_kernel_says_that_it_panics(tmp_path: Path) -> None:
    # With its driver for pvpanic, which finds the port by ACPI. Our init ends, which no kernel bears.
    kernel = dataclasses.replace(debian_kernel(), wanted=("pvpanic_mmio",))
    initrd = tmp_path / "initrd"
    write_initrd(initrd, kernel)
    machine: dict[str, object] = {
        "kernel": str(kernel.image),
        "initrd": str(initrd),
        "cmdline": "console=ttyS0 quiet panic=-1 kvmd.test.end=panic",
        "memory": "256M",
        "entropy": False,
    }
    ended = run(tmp_path, machine)
    assert ended.status == 122, ended.errors
    assert '"reason":"guest-panic"' in ended.errors
    (tail,) = [line for line in ended.errors.splitlines() if '"event":"console-tail"' in line]
    assert "Attempted to kill init!" in tail
