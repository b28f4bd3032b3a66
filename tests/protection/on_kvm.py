"""A guest on the real KVM that loads one byte after the other, wherever a test wants to know what is there."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Protocol

from kvmd.hv.exits import Exit, MemoryFault, Mmio, PortIo
from kvmd.hv.vcpu import Registers
from kvmd.kvm import uapi
from kvmd.kvm.fault_layout import MERGED
from kvmd.kvm.guest_memfd import GuestMemfd
from kvmd.kvm.system import Kvm
from kvmd.kvm.vcpu import KvmVcpu
from kvmd.kvm.vm import Vm
from tests.gate import Facility, require

PAGE = 0x1000
GPA = 0x200000
"""The guest reaches [2 MiB, 4 MiB); what is below is its own."""
PAGES = 64
"""Pages of host memory for tests, at ``OnKvm.address``."""
TRIPWIRE = uapi.GUEST_MEMFD_FLAG_MMAP | uapi.GUEST_MEMFD_FLAG_INIT_SHARED
LOAD_AND_COUNT = b"\x8a\x03\x48\xff\x04\x25\x00\x00\x02\x00\xeb\xf4"  # 1: mov al, [rbx]; inc qword [0x20000]; jmp 1b
STORE_AND_COUNT = b"\x88\x03" + LOAD_AND_COUNT[2:]  # 1: mov [rbx], al; ...
_RAM_BYTES = 1 << 20


class Memfd(Protocol):
    """A guest_memfd, real or not."""

    def close(self) -> None: ...

    def punch_hole(self, offset: int, size: int) -> None: ...


class OnKvm:
    """The real VM, with a guest that loads a byte from RBX, says so at a port, and starts again."""

    _PML4, _PDPT, _PD, _CODE, _COUNT = 0x1000, 0x2000, 0x3000, 0x10000, 0x20000
    _LOAD_AND_SAY = b"\x8a\x03\xe6\x12\xeb\xfa"  # 1: mov al, [rbx]; out 0x12, al; jmp 1b

    def __init__(self, kvm: Kvm, vm: Vm, memory: int) -> None:
        self._vm = vm
        # The guest's own slot has the last number, so that the tests have those from 0.
        self.slot_count = vm.check_extension(uapi.KVM_CAP_NR_MEMSLOTS)
        self.address = memory + _RAM_BYTES
        for place, entry in (
            (self._PML4, self._PDPT | 7),
            (self._PDPT, self._PD | 7),
            (self._PD, 0x87),
            (self._PD + 8, GPA | 0x87),
        ):
            ctypes.memmove(memory + place, struct.pack("<Q", entry), 8)
        ctypes.memmove(memory + self._CODE, self._LOAD_AND_SAY, len(self._LOAD_AND_SAY))
        vm.set_memory_region(self.slot_count - 1, 0, _RAM_BYTES, memory)
        self._vcpu: KvmVcpu = vm.create_vcpu(0, MERGED)
        self._vcpu.set_cpuid(kvm.supported_cpuid())
        self._vcpu.set_long_mode(cr3=self._PML4, cpl=3)
        self._vcpu.set_registers(Registers(rip=self._CODE, rflags=0x3002))
        self._vcpu.prepare_thread()

    def set(
        self,
        slot: int,
        gpa: int,
        size: int,
        address: int,
        *,
        flags: int = 0,
        memfd: Memfd | None = None,
        offset: int = 0,
    ) -> None:
        assert memfd is None or isinstance(memfd, GuestMemfd)
        self._vm.set_memory_region(slot, gpa, size, address, flags, memfd, offset)

    def delete(self, slot: int) -> None:
        self._vm.delete_memory_region(slot)

    def swap(self, dying: int, tripwire_gpa: int, memfd: Memfd, rising: int, live_gpa: int) -> None:
        assert isinstance(memfd, GuestMemfd)
        self._vm.swap_views(dying, tripwire_gpa, self.address, memfd, rising, live_gpa, self.address, PAGE)

    def memfd(self, size: int, flags: int = TRIPWIRE) -> GuestMemfd:
        offered = self._vm.check_extension(uapi.KVM_CAP_GUEST_MEMFD_FLAGS)
        require(
            Facility.KVM,
            None if offered & TRIPWIRE == TRIPWIRE else f"KVM_CAP_GUEST_MEMFD_FLAGS is {offered}: no tripwires",
        )
        return self._vm.create_guest_memfd(size, flags)

    def access(self, gpa: int) -> str:
        vcpu = self._vcpu
        match self.exit_at(gpa):
            case PortIo():
                return "live"
            case MemoryFault(gpa=at):
                assert at == gpa & ~(PAGE - 1)
                return "tripwire"
            case Mmio(gpa=at):
                assert at == gpa
                vcpu.complete_read(b"\xff")
                # The load ends, and the guest comes to its port.
                assert isinstance(vcpu.run(), PortIo)
                return "hole"
            case other:
                raise AssertionError(other)

    def exit_at(self, gpa: int) -> Exit:
        """Let the guest load a byte there and return why it left."""
        self._vcpu.set_registers(replace(self._vcpu.registers(), rbx=gpa))
        return self._vcpu.run()

    def put(self, code: bytes, *, rbx: int) -> None:
        """Let the guest go on with other code, which finds an address in RBX."""
        ctypes.memmove(self.address - _RAM_BYTES + self._CODE, code, len(code))
        self._vcpu.set_registers(Registers(rip=self._CODE, rbx=rbx, rflags=0x3002))

    def run(self) -> Exit:
        """Let the guest go on."""
        return self._vcpu.run()

    @property
    def count(self) -> int:
        """Rounds that ``LOAD_AND_COUNT`` or ``STORE_AND_COUNT`` has made. From any thread."""
        return ctypes.c_uint64.from_address(self.address - _RAM_BYTES + self._COUNT).value

    def wait_for_count(self, count: int) -> None:
        """Wait until the guest, in another thread, has come so far."""
        while self.count < count:
            os.sched_yield()

    def kick(self) -> None:
        """Have the present or the next ``run`` return ``Interrupted``. From any thread."""
        self._vcpu.request_exit()

    def forget_kicks(self) -> None:
        """Let ``run`` run again."""
        self._vcpu.clear_exit_request()

    def close(self) -> None:
        self._vcpu.release_thread()
        self._vcpu.close()


@contextmanager
def on_kvm(kvm: Kvm, vm: Vm) -> Iterator[OnKvm]:
    """Put the guest into an empty VM, which is closed in the end."""
    memory = mmap.mmap(-1, _RAM_BYTES + PAGES * PAGE)
    view = ctypes.c_char.from_buffer(memory)
    try:
        with closing(OnKvm(kvm, vm, ctypes.addressof(view))) as guest:
            yield guest
    finally:
        del view
        vm.close()
        memory.close()
