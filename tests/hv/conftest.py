"""A tiny guest on every accelerator, and on the fake: what holds for one has to hold for all."""

from __future__ import annotations

import ctypes
import mmap
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

import pytest

from kvmd.hv.exits import Exit
from kvmd.hv.vcpu import Registers, Vcpu
from kvmd.kvm.fault_layout import MERGED
from kvmd.kvm.system import Kvm
from kvmd.kvm.uapi import KVM_CAP_GUEST_MEMFD_FLAGS
from kvmd.ranges import GpaRange, PageState
from kvmd.software.memory import GuestMemory
from tests.fakes import FakeVcpu
from tests.gate import Facility, require

RAM_BYTES = 1 << 20
PML4, PDPT, PD, HIGH_PD = 0x1000, 0x2000, 0x3000, 0x4000
CODE, STACK = 0x10000, 0x9000
TRIPPED = 0x4000_0000
"""The virtual address of the private view, whose pages are not live."""
_FLAGS = 0x7
_LARGE = 0x80
_RFLAGS = 0x3002
_MMAP_AND_INIT_SHARED = 3

Guest = Callable[[FakeVcpu], Exit]


@dataclass
class Bench:
    """Starts vCPUs of one kind on 1 MiB of memory, mapped one to one; nothing backs what is above it."""

    kind: str
    ram: int = 0
    c_bit: int = 47
    _stack: ExitStack = field(default_factory=ExitStack)
    _create: Callable[[int], Vcpu] | None = None
    _make_live: Callable[[], None] | None = None
    _make_shared: Callable[[], None] | None = None
    _private: int = 0

    def start(self, code: bytes, *, guest: Guest | None = None, cpl: int = 3, index: int = 0, rax: int = 0) -> Vcpu:
        """Return a vCPU about to run ``code``; where it is a fake, ``guest`` runs in its place."""
        registers = Registers(rax=rax, rip=CODE, rsp=STACK, rflags=_RFLAGS)
        if self.kind == "fake":
            assert guest is not None
            fake = FakeVcpu(index, guest)
            fake.set_registers(registers)
            return fake
        assert self._create is not None
        ctypes.memmove(self.ram + CODE, code, len(code))
        vcpu = self._create(index)
        self._stack.callback(vcpu.close)
        self._stack.callback(vcpu.release_thread)
        vcpu.set_long_mode(cr3=PML4, cpl=cpl)
        vcpu.set_registers(registers)
        return vcpu

    def make_private_live(self) -> None:
        """Make the view at ``TRIPPED`` live."""
        assert self._make_live is not None
        self._make_live()

    def make_shared_live(self) -> None:
        """Undo that."""
        assert self._make_shared is not None
        self._make_shared()

    def read_private(self, gpa: int, size_bytes: int) -> bytes:
        """Return what the private view holds."""
        return ctypes.string_at(self._private + gpa, size_bytes)

    def write_private(self, gpa: int, data: bytes) -> None:
        """Change what it holds."""
        ctypes.memmove(self._private + gpa, data, len(data))

    def open(self) -> None:
        """Set memory up, and what runs the vCPUs."""
        if self.kind == "fake":
            return
        if self.kind == "kvm":
            kvm = self._stack.enter_context(Kvm.open())
            self.c_bit = kvm.physical_address_bits() - 1
        memory = mmap.mmap(-1, RAM_BYTES)
        self._stack.callback(memory.close)
        private = mmap.mmap(-1, RAM_BYTES)
        self._stack.callback(private.close)
        self.ram = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        other = ctypes.addressof(ctypes.c_char.from_buffer(private))
        self._private = other
        for address, entry in (
            (PML4, PDPT | _FLAGS),
            (PDPT, PD | _FLAGS),
            (PDPT + 8, HIGH_PD | _FLAGS),
            (PD, _LARGE | _FLAGS),
            (PD + 8, 0x200000 | _LARGE | _FLAGS),
            (HIGH_PD, 1 << self.c_bit | _LARGE | _FLAGS),
        ):
            ctypes.memmove(self.ram + address, struct.pack("<Q", entry), 8)
        if self.kind == "kvm":
            self._open_kvm(kvm, other)
        else:
            self._open_software(other)

    def close(self) -> None:
        """Give up everything."""
        self._stack.close()

    def _open_software(self, other: int) -> None:
        from kvmd.software.vm import SoftwareVm  # noqa: PLC0415 - needs the emulator

        addresses = {PageState.SHARED: self.ram, PageState.PRIVATE: other}
        memory = GuestMemory(RAM_BYTES, addresses, c_bit=self.c_bit, initial=PageState.SHARED)
        vm = SoftwareVm(memory)
        self._stack.callback(vm.close)
        self._create = vm.create_vcpu
        self._make_live = lambda: vm.make_live(GpaRange(0x20000, 0x30000), PageState.PRIVATE)
        self._make_shared = lambda: vm.make_live(GpaRange(0x20000, 0x30000), PageState.SHARED)

    def _open_kvm(self, kvm: Kvm, other: int) -> None:
        vm = self._stack.enter_context(kvm.create_vm())
        vm.set_memory_region(0, 0, RAM_BYTES, self.ram)

        def create(index: int) -> Vcpu:
            vcpu = vm.create_vcpu(index, MERGED)
            vcpu.set_cpuid(kvm.supported_cpuid())
            return vcpu

        def make_live() -> None:
            vm.delete_memory_region(1)
            vm.set_memory_region(1, 1 << self.c_bit, RAM_BYTES, other)

        self._create = create
        self._make_live = make_live
        if vm.check_extension(KVM_CAP_GUEST_MEMFD_FLAGS) & _MMAP_AND_INIT_SHARED == _MMAP_AND_INIT_SHARED:
            memfd = vm.create_guest_memfd(RAM_BYTES, _MMAP_AND_INIT_SHARED)
            vm.set_memory_region(1, 1 << self.c_bit, RAM_BYTES, other, guest_memfd=memfd)
            memfd.close()
        else:
            self._make_live = None

    def require_tripwire(self) -> None:
        """Skip where there is nothing that trips."""
        if self.kind == "kvm":
            missing = None if self._make_live else "this KVM has no KVM_CAP_GUEST_MEMFD_FLAGS"
            require(Facility.KVM, missing)


def _bench(kind: str) -> Iterator[Bench]:
    bench = Bench(kind)
    try:
        bench.open()
        yield bench
    finally:
        bench.close()


_SOFTWARE = pytest.param("software", marks=pytest.mark.software)
_KVM = pytest.param("kvm", marks=pytest.mark.kvm)


@pytest.fixture(params=["fake", _SOFTWARE, _KVM])
def any_bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """Yield a bench of every kind in turn."""
    yield from _bench(request.param)


@pytest.fixture(params=[_SOFTWARE, _KVM])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """Yield a bench of every kind that runs machine code."""
    yield from _bench(request.param)
