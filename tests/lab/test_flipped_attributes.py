"""An attribute flipped in mid-fault: the only memory fault of a KVM_X86_SW_PROTECTED_VM that is nobody's mistake.

KVM looks at the attribute when a fault begins, and once more before it maps the page. A flip in between ends in
KVM_EXIT_MEMORY_FAULT with what the fault began with (arch/x86/kvm/mmu/mmu.c, kvm_mmu_faultin_pfn). In the lab about one
flip in a hundred meets a fault there, since each flip takes the page away from the guest; so the exit is there after
some hundreds of flips. tests/protection/test_guest_memfd_exits.py has the same at chosen moments, without KVM.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections import Counter
from pathlib import Path
from typing import Self

import pytest
import trio

from kvmd.conversion.messages import Cause, Outcome
from kvmd.hv.exits import Exit, Interrupted, MemoryFault
from kvmd.kvm import uapi
from kvmd.kvm.guest_memfd import GuestMemfd
from kvmd.kvm.system import Kvm
from kvmd.kvm.vm import Vm
from kvmd.machine import Machine
from kvmd.memory.accessor import PrivateMemory
from kvmd.ranges import GpaRange, PageState
from kvmd.stop import StopReason
from kvmd.units import MIB, PAGE_SIZE
from tests.machine.conftest import OpenMachine, Ran, finish
from tests.payload.test_elf import elf, program_header
from tests.protection.on_kvm import GPA, LOAD_AND_COUNT, PAGE, STORE_AND_COUNT, OnKvm, on_kvm

pytestmark = [pytest.mark.kvm, pytest.mark.private_memory]

MOST_FLIPS = 200_000
"""Two hundred times what it takes in the lab, and still a minute or two."""

# -- KVM alone -----------------------------------------------------------------------------------------------


class Flipper:
    """A thread that flips a page's attribute, and empties the side that dies, until told to stop."""

    def __init__(self, vm: Vm, guest: OnKvm, memfd: GuestMemfd) -> None:
        self._vm, self._guest, self._memfd = vm, guest, memfd
        self._page = GpaRange.of_size(GPA, PAGE)
        self.flips = 0
        self.enough = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while self.flips < MOST_FLIPS and not self.enough.is_set():
            self._vm.set_memory_attributes(self._page, uapi.KVM_MEMORY_ATTRIBUTE_PRIVATE)
            ctypes.memset(self._guest.address, 0, PAGE)
            self._vm.set_memory_attributes(self._page, 0)
            self._memfd.punch_hole(0, PAGE)
            self.flips += 2
        self._guest.kick()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.enough.set()
        self._thread.join()


@pytest.mark.parametrize("code", [LOAD_AND_COUNT, STORE_AND_COUNT], ids=["load", "store"])
def test_kvm_reports_the_state_that_a_fault_began_with_and_the_guest_can_go_on(
    kvm: Kvm, protected_vm: Vm, code: bytes
) -> None:
    seen: Counter[bool] = Counter()
    other: list[Exit] = []
    with on_kvm(kvm, protected_vm) as guest, protected_vm.create_guest_memfd(PAGE) as memfd:
        guest.set(0, GPA, PAGE, guest.address, memfd=memfd)
        guest.put(code, rbx=GPA)
        with Flipper(protected_vm, guest, memfd) as flipper:
            while not isinstance(exit_ := guest.run(), Interrupted):
                if not isinstance(exit_, MemoryFault):
                    other.append(exit_)
                    break
                assert (exit_.gpa, exit_.size) == (GPA, PAGE)
                seen[exit_.private] += 1
                if len(seen) == 2:
                    # Nothing was done about any of them, and the guest went on each time.
                    flipper.enough.set()
        assert other == []
        assert seen.keys() == {False, True}, f"{flipper.flips} flips met no fault"
        guest.forget_kicks()
        kicker = threading.Thread(target=kick_at, args=(guest, guest.count + 1000))
        kicker.start()
        assert isinstance(guest.run(), Interrupted), "without flips there is no fault"
        kicker.join()


def kick_at(guest: OnKvm, count: int) -> None:
    guest.wait_for_count(count)
    guest.kick()


# -- a whole machine -----------------------------------------------------------------------------------------

TOUCH = bytes.fromhex(
    "4c8b4620"  # start: mov r8, [rsi + 32]: the first free byte
    "4c8b4e30"  # mov r9, [rsi + 48]: argument 0, rounds
    "49bac25ee7c25ee7c25e"  # mov r10, SECRET
    "85ff 7556"  # test edi, edi; jnz touch
    "b80c000000"  # flip: mov eax, 12
    "4c89c3 b901000000 ba10000000"  # mov rbx, r8; mov ecx, 1; mov edx, 16: that page to private
    "e6c2"  # out 0xc2, al
    "4189c3 85c0 752f"  # mov r11d, eax; test eax, eax; jnz end
    "4d8910"  # mov [r8], r10
    "b80c000000 31d2 e6c2"  # mov eax, 12; xor edx, edx; out 0xc2, al: to shared
    "4189c3 85c0 751c"  # mov r11d, eax; test eax, eax; jnz end
    "41bb02000000 4d3910 7411"  # mov r11d, 2; cmp [r8], r10; je end: what was private shows
    "4531db"  # xor r11d, r11d
    "803d28000000 00 7505"  # cmp byte [enough], 0; jne end
    "49ffc9 75b6"  # dec r9; jnz flip
    "c60519000000 01"  # end: mov byte [done], 1
    "4489d8 e6f4"  # mov eax, r11d; out 0xf4, al
    "498b00 49897808"  # touch: mov rax, [r8]; mov [r8 + 8], rdi
    "803d06000000 00 74f0"  # cmp byte [done], 0; je touch
    "31c0 e6f4"  # xor eax, eax; out 0xf4, al
    "00"  # done
    "00"  # enough
)
"""The first vCPU converts one page to and fro and leaves SECRET in it while it is private; the other touches it."""
SECRET = 0x5EC2E75EC2E75EC2
MOST_ROUNDS = 5000
"""Some fifty times what it takes in the lab."""
LEAST_RECORDS = 200


class Watcher:
    """The host's part: looks into the page after each batch of conversions, and ends the guest once it has seen enough.

    Attributes:
        faults: how the requests of vCPU 1 ended; none of them is a request of the guest's own.
        looks: how often the page was shared when it was looked at.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._reader = machine.records.reader()
        self.faults: Counter[Outcome] = Counter()
        self.looks = 0
        self._records = 0

    async def run(self) -> None:
        while not (self.faults and self._records >= LEAST_RECORDS):
            written = trio.Event()
            self._reader.wake_once(written.set)
            try:
                await written.wait()
            finally:
                self._reader.forget(written.set)
            _, records = self._reader.take(1 << 16)
            self._records += len(records)
            self.faults.update(record.outcome for record in records if record.cause is Cause.IMPLICIT)
            self._look()
        self._machine.memory.write(MIB + len(TOUCH) - 1, b"\1")

    def _look(self) -> None:
        try:
            (found,) = struct.unpack("<Q", self._machine.memory.read(self._machine.pinned.end, 8))
        except PrivateMemory:
            return
        assert found == 0, "a private byte shows in the shared view"
        self.looks += 1


async def test_a_machine_whose_page_is_converted_under_another_vcpu_goes_on(
    open_machine: OpenMachine, tmp_path: Path
) -> None:
    """The exits are there, none of them converts, and the guest that knows nothing of them comes to its end."""
    image = tmp_path / "touch.elf"
    image.write_bytes(elf(program_header(data_size=len(TOUCH)))[:0x200] + TOUCH)
    machine = open_machine("hello", MOST_ROUNDS, image=image, vcpus=2, memory=16 * MIB, protection="guest-memfd")
    watcher = Watcher(machine)
    ran: list[Ran] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watcher.run)
        ran.append(await finish(machine))
        nursery.cancel_scope.cancel()
    assert (ran[0].stop.reason, ran[0].stop.status) == (StopReason.GUEST_EXIT, 0), ran[0].stop
    faults = [record for record in ran[0].records if record.cause is Cause.IMPLICIT]
    assert faults, f"{len(ran[0].records)} conversions met no fault"
    # Stale where the page is in the other state by now, spurious where it was converted back meanwhile.
    assert {record.outcome for record in faults} <= {Outcome.STALE, Outcome.SPURIOUS}
    assert {(record.vcpu, record.gpa, record.size_bytes) for record in faults} == {(1, machine.pinned.end, PAGE_SIZE)}
    explicit = [record for record in ran[0].records if record.cause is Cause.EXPLICIT]
    # All memory starts private.
    assert explicit.pop(0).outcome is Outcome.SPURIOUS
    assert {record.outcome for record in explicit} == {Outcome.CONVERTED}
    assert [record.to for record in explicit] == ([PageState.SHARED, PageState.PRIVATE] * len(explicit))[
        : len(explicit)
    ]
    assert watcher.looks > 0
