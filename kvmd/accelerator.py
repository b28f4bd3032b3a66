"""What runs a machine's guest: KVM, or the software CPU where there is no KVM to use."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from kvmd.errors import ConfigError, HostError
from kvmd.hardware import Hardware, kvm_problem, open_kvm
from kvmd.payload.elf import LoadedImage
from kvmd.software_hardware import open_software
from kvmd.spec.machine import MachineSpec

if TYPE_CHECKING:
    from kvmd.linux_hardware import LinuxImage


def open_hardware(
    spec: MachineSpec, image: LoadedImage, quiesce: Callable[[], AbstractContextManager[None]]
) -> Hardware:
    """Build a machine on the accelerator that its spec asks for; ``auto`` takes KVM where that works.

    Args:
        spec: what it is made of.
        image: the guest, parsed.
        quiesce: a context in which no vCPU is in the guest.

    Raises:
        HostError: this host cannot run it; nothing is left behind.
        ConfigError, ImageError: the spec does not fit the host or the image.
    """
    if spec.accelerator == "software":
        return open_software(spec, image)
    if spec.accelerator == "auto" and (problem := kvm_problem()) is not None:
        return open_software(spec, image, problem)
    return open_kvm(spec, image, quiesce)


def open_linux_hardware(spec: MachineSpec, image: LinuxImage, *, devices: int) -> Hardware:
    """Build a Linux machine, which needs KVM: the software CPU has no interrupts.

    Args:
        spec: what it is made of.
        image: the guest, parsed.
        devices: how many virtio devices it has.

    Raises:
        HostError: this host cannot run it; nothing is left behind.
        ConfigError, ImageError: the spec does not fit the host or the image.
    """
    if spec.accelerator == "software":
        raise ConfigError("accelerator: the software CPU runs payload guests only: Linux needs kvm, or auto")
    if spec.accelerator == "auto" and (problem := kvm_problem()) is not None:
        raise HostError(f"a Linux guest needs KVM: {problem}")
    from kvmd.linux_hardware import open_linux  # noqa: PLC0415 - payloads start faster without it

    return open_linux(spec, image, devices=devices)
