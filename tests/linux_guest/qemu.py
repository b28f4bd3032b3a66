"""The same guest under QEMU's microvm: what our init is tried on, and what kvmd is measured against."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class QemuNetwork:
    """A network card of the guest's.

    Attributes:
        fd: of an open tap, which QEMU inherits.
        mac: the guest's address, as text.
    """

    fd: int
    mac: str


def microvm(
    *,
    program: str,
    kernel: Path,
    initrd: Path,
    cmdline: str,
    accelerator: str,
    vcpus: int = 2,
    memory_mib: int = 256,
    disk: Path | None = None,
    network: QemuNetwork | None = None,
) -> list[str]:
    """Return the command that runs a guest on QEMU's microvm, its console on standard input and output.

    Args:
        program: the path of qemu-system-x86_64.
        kernel: a bzImage.
        initrd: an initial RAM disk.
        cmdline: the kernel's.
        accelerator: ``kvm`` or ``tcg``.
        vcpus: how many.
        memory_mib: the guest's memory.
        disk: a raw one, written to.
        network: a card, or None.
    """
    # With ACPI's reduced hardware Linux has no timer but KVM's: without KVM it needs the old ones, and no ACPI.
    timers = "pic=off,pit=off,rtc=off" if accelerator == "kvm" else "pic=on,pit=on,rtc=on,acpi=off"
    command = [
        *(program, "-machine", f"microvm,accel={accelerator},{timers}"),
        *("-cpu", "host" if accelerator == "kvm" else "max", "-smp", str(vcpus), "-m", f"{memory_mib}M"),
        *("-no-user-config", "-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio"),
        *("-kernel", str(kernel), "-initrd", str(initrd), "-append", cmdline),
        *("-device", "virtio-rng-device"),
    ]
    if disk is not None:
        command += ["-drive", f"id=disk,file={disk},format=raw,if=none,cache=writeback"]
        command += ["-device", "virtio-blk-device,drive=disk"]
    if network is not None:
        command += ["-netdev", f"tap,id=net,fd={network.fd},vhost=off"]
        command += ["-device", f"virtio-net-device,netdev=net,mac={network.mac}"]
    return command
