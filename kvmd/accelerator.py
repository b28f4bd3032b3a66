"""What runs a machine's guest: KVM, or the software CPU where there is no KVM to use."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from kvmd.hardware import Hardware, kvm_problem, open_kvm
from kvmd.payload.elf import LoadedImage
from kvmd.software_hardware import open_software
from kvmd.spec import MachineSpec


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
