"""Whether guest kernels run on this host's processor, or are emulated by its KVM, which takes Linux minutes to boot."""

from __future__ import annotations

import struct
import time
from contextlib import closing

from kvmd.errors import BackendError
from kvmd.hv.exits import PortIo
from kvmd.hv.vcpu import Registers
from kvmd.kvm.fault_layout import choose_layout
from kvmd.kvm.system import Kvm
from kvmd.kvm.uapi import KVM_CAP_MEMORY_FAULT_INFO
from kvmd.kvm.vcpu import KvmVcpu
from kvmd.memory.backing import Backing
from kvmd.units import PAGE_SIZE

EMULATED_NS = 200.0
"""Above it an instruction of a guest's kernel is emulated: KVM takes about 1000 ns, the lab's processor 10."""

_ROUNDS = 5
_TURNS = 5_000
_IN_A_TURN = 2
_GDT, _CODE, _END = 0x0, 0x100, PAGE_SIZE
_SEGMENTS = struct.pack("<3Q", 0, 0x00CF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF)
"""Flat segments of 4 GiB: code, data."""

_LOOP = b"\xb9" + struct.pack("<I", _TURNS) + b"\x49\x75\xfd\xe6\xf4"
"""``mov ecx, _TURNS``; ``dec ecx`` and ``jnz`` back to it; ``out 0xf4, al``: in 32 bits, at privilege level 0."""


def kernel_instruction_ns() -> float:
    """Return nanoseconds that one instruction of a guest's kernel takes: the quickest of some rounds, once warm.

    Raises:
        HostError: there is no usable KVM.
        BackendError: it does not run the loop to its end.
    """
    with Kvm.open() as kvm, kvm.create_vm() as vm, Backing("probe", _END) as memory:
        memory.write(_GDT, _SEGMENTS)
        memory.write(_CODE, _LOOP)
        vm.set_memory_region(0, 0, _END, memory.address_of(0))
        layout = choose_layout(memory_fault_info=vm.check_extension(KVM_CAP_MEMORY_FAULT_INFO) > 0)
        with closing(vm.create_vcpu(0, layout)) as vcpu:
            vcpu.set_cpuid(kvm.supported_cpuid())
            vcpu.set_protected_mode(gdt=(_GDT, len(_SEGMENTS)))
            return min(_round(vcpu) for _ in range(_ROUNDS)) * 1e9 / (_TURNS * _IN_A_TURN)


def _round(vcpu: KvmVcpu) -> float:
    """Return the seconds that the loop takes."""
    vcpu.set_registers(Registers(rip=_CODE, rflags=2))
    began = time.perf_counter()
    exit_ = vcpu.run()
    passed = time.perf_counter() - began
    if not isinstance(exit_, PortIo):
        raise BackendError(f"a loop of a guest's kernel ended with {exit_}")
    return passed
