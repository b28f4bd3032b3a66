"""A tiny guest."""

from __future__ import annotations

import ctypes
import mmap
import struct
from collections.abc import Callable, Iterator

import pytest

from kvmd.hv.vcpu import Registers
from kvmd.kvm.fault_layout import MERGED
from kvmd.kvm.system import Kvm
from kvmd.kvm.vcpu import KvmVcpu
from kvmd.kvm.vm import Vm

RAM_BYTES = 1 << 20
PML4, PDPT, PD = 0x1000, 0x2000, 0x3000
CODE, STACK = 0x10000, 0x9000
PRESENT_WRITABLE_USER = 0x7
LARGE_PAGE = 0x80
IOPL_3 = 0x3000
RFLAGS_FIXED = 0x2


@pytest.fixture
def ram() -> Iterator[int]:
    """Yield the address of anonymous memory for the guest."""
    memory = mmap.mmap(-1, RAM_BYTES)
    view = ctypes.c_char.from_buffer(memory)
    yield ctypes.addressof(view)
    del view
    memory.close()


@pytest.fixture
def boot(kvm: Kvm, vm: Vm, ram: int) -> Iterator[Callable[..., KvmVcpu]]:
    """Yield a function that puts code at CODE of a 1 MiB guest and returns its vCPU in long mode.

    The first 4 MiB are mapped one to one; nothing backs what is above the first.
    """
    vcpus: list[KvmVcpu] = []

    def start(code: bytes, *, cpl: int = 3, index: int = 0, rax: int = 0) -> KvmVcpu:
        tables = (
            (PML4, PDPT | PRESENT_WRITABLE_USER),
            (PDPT, PD | PRESENT_WRITABLE_USER),
            (PD, LARGE_PAGE | PRESENT_WRITABLE_USER),
            (PD + 8, 0x200000 | LARGE_PAGE | PRESENT_WRITABLE_USER),
        )
        for address, entry in tables:
            ctypes.memmove(ram + address, struct.pack("<Q", entry), 8)
        ctypes.memmove(ram + CODE, code, len(code))
        if not vcpus:
            vm.set_memory_region(0, 0, RAM_BYTES, ram)
        vcpu = vm.create_vcpu(index, MERGED)
        vcpus.append(vcpu)
        vcpu.set_cpuid(kvm.supported_cpuid())
        vcpu.set_long_mode(cr3=PML4, cpl=cpl)
        vcpu.set_registers(Registers(rax=rax, rip=CODE, rsp=STACK, rflags=RFLAGS_FIXED | IOPL_3))
        return vcpu

    yield start
    for vcpu in vcpus:
        vcpu.release_thread()
        vcpu.close()
