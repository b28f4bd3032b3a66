"""What a Linux guest's processors find of the platform, asked by kernels of a few instructions on any KVM.

A kernel starts in 64-bit mode, without a stack; what it tells is four bytes a value on the serial port.
"""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import trio

from kvmd.linux.address_map import BUTTON_GSI, IOAPIC
from kvmd.machine import Machine
from kvmd.spec.machine import spec_of
from kvmd.stop import StopReason
from tests.linux.kernels import running

pytestmark = pytest.mark.kvm

SECONDS = 60.0

POWER_OFF = b"\x66\xba\x00\x06\xb0\x34\xee\xeb\xfe"  # mov dx, 0x600; mov al, 0x34; out dx, al; jmp $
SHOW = b"\x66\xba\xf8\x03" + b"\xee\xc1\xe8\x08" * 4  # mov dx, 0x3f8; (out dx, al; shr eax, 8) four times
X2APIC_ICR = 0x830
INIT, STARTUP = 0x4500, 0x4600
KVM_SYSTEM_TIME = 0x4B56_4D01
"""MSR_KVM_SYSTEM_TIME_NEW (Documentation/virt/kvm/x86/msr.rst)."""


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def read(register: int) -> bytes:
    return b"\xb9" + u32(register) + b"\x0f\x32"  # mov ecx; rdmsr


def write(register: int, low: int, high: int = 0) -> bytes:
    return b"\xb9" + u32(register) + b"\xb8" + u32(low) + b"\xba" + u32(high) + b"\x0f\x30"  # mov ecx, eax, edx; wrmsr


X2APIC = read(0x1B) + b"\x0d" + u32(0xC00) + b"\x0f\x30"  # or eax; wrmsr: IA32_APIC_BASE, EN and EXTD


def words(text: bytes) -> list[int]:
    return list(struct.unpack(f"<{len(text) // 4}I", text))


def told(
    folder: Path,
    code: bytes,
    *,
    press_after: bytes = b"",
    reason: StopReason = StopReason.GUEST_POWER_OFF,
    **keys: object,
) -> list[int]:
    """Return what a kernel of this code tells until it powers off.

    Args:
        folder: for the kernel.
        code: tells what is asked.
        press_after: when it has told this, its power button is pressed.
        reason: how it ends instead.
        keys: more of the machine's spec.
    """
    (folder / "kernel").write_bytes(running(code + POWER_OFF))
    document = {"kernel": "kernel", "memory": "64M", "entropy": False, "accelerator": "kvm", **keys}
    with Machine.open(spec_of(document, base=folder)) as machine:
        console = b""

        async def press() -> None:
            nonlocal console
            while press_after not in console:
                console += machine.console.take()
                await trio.lowlevel.checkpoint()
            assert machine.power_button is not None
            machine.power_button()

        async def to_the_end() -> None:
            with trio.fail_after(SECONDS):
                async with trio.open_nursery() as nursery:
                    if press_after:
                        nursery.start_soon(press)
                    stop = await machine.run()
            assert stop.reason is reason, stop.message

        trio.run(to_the_end)
        assert machine.ports.unclaimed == machine.mmio.unclaimed == 0
        return words(console + machine.console.take())


def test_registers_are_as_firmware_leaves_them(tmp_path: Path) -> None:
    miscellaneous, ranges = told(tmp_path, read(0x1A0) + SHOW + read(0x2FF) + SHOW)
    assert miscellaneous & 1  # fast strings
    assert ranges == 0x806  # memory types: enabled, write-back


def test_the_local_apic_has_its_second_mode(tmp_path: Path) -> None:
    number, version = told(tmp_path, X2APIC + read(0x802) + SHOW + read(0x803) + SHOW, vcpus=2)
    assert number == 0
    assert version & 0xFF >= 0x10


def test_kvmclock_ticks(tmp_path: Path) -> None:
    # mov eax, [0x3000 + offset] of struct pvclock_vcpu_time_info: its version, and how the TSC becomes nanoseconds
    version, multiplier = told(
        tmp_path,
        write(KVM_SYSTEM_TIME, 0x3000 | 1)
        + b"".join(b"\x8b\x04\x25" + u32(0x3000 + offset) + SHOW for offset in (0, 24)),
    )
    assert version > 0
    assert version % 2 == 0  # not while it is written
    assert multiplier > 0


def second_processor(trampoline: bytes) -> bytes:
    """Return code that starts another processor with up to 16 bytes, which it puts at 0x10000."""
    padded = trampoline.ljust(16, b"\x90")
    copy = b"".join(
        b"\xc7\x04\x25" + u32(0x1_0000 + at) + padded[at : at + 4] for at in range(0, len(padded), 4)
    )  # mov dword [address], value
    return X2APIC + copy + write(X2APIC_ICR, INIT, 1) + write(X2APIC_ICR, STARTUP | 0x10, 1)


def test_the_guest_starts_its_other_processors(tmp_path: Path) -> None:
    start = second_processor(b"\x2e\x66\xc7\x06\x00\x01up!\n\xf4")  # mov dword [cs:0x100], "up!\n"; hlt
    wait = b"\x8b\x04\x25" + u32(0x1_0100) + b"\x85\xc0\xf3\x90\x74\xf3"  # mov eax, [0x10100]; test; pause; jz
    assert told(tmp_path, start + wait + SHOW, vcpus=2) == [int.from_bytes(b"up!\n", "little")]


def test_a_kernel_may_leave_the_reset_to_a_firmware_that_is_not_there(tmp_path: Path) -> None:
    far_jump = b"\xea\xf0\xff\x00\xf0"  # in real mode: jmp 0xf000:0xfff0
    told(tmp_path, second_processor(far_jump) + b"\xf3\x90\xeb\xfc", vcpus=2, reason=StopReason.GUEST_REBOOT)


def test_the_io_apic_has_24_lines(tmp_path: Path) -> None:
    (version,) = told(tmp_path, b"\xbb" + u32(IOAPIC) + b"\xc7\x03" + u32(1) + b"\x8b\x43\x10" + SHOW)
    assert version >> 16 & 0xFF == 23


def test_the_pit_counts(tmp_path: Path) -> None:
    # Channel 0 from 0xffff down: out 0x43, 0x34; out 0x40, 0xff, twice
    begin = b"\xb0\x34\xe6\x43\xb0\xff\xe6\x40\xe6\x40"
    latched = b"\xb0\x00\xe6\x43\xe4\x40"  # out 0x43, 0; in al, 0x40: the low byte
    first = latched + b"\x88\xc3\xe4\x40"  # mov bl, al; in al, 0x40
    until_another = latched + b"\x88\xc1\xe4\x40\x38\xd9\x74\xf2"  # mov cl, al; in al, 0x40; cmp cl, bl; je
    said = u32(0x6B636974)
    assert told(tmp_path, begin + first + until_another + b"\xb8" + said + SHOW) == words(said)


def test_the_power_button_is_an_interrupt(tmp_path: Path) -> None:
    def route(register: int, value: int) -> bytes:
        return b"\xc7\x03" + u32(register) + b"\xc7\x43\x10" + u32(value)  # mov [rbx]; mov [rbx + 16]

    vector = 0x41  # which the processor leaves pending, since it takes none: bit 1 of the third word of the IRR
    pin = b"\xbb" + u32(IOAPIC) + route(0x10 + 2 * BUTTON_GSI + 1, 0) + route(0x10 + 2 * BUTTON_GSI, vector)
    ready = b"\xb8" + b"rdy\n" + SHOW
    wait = read(0x822) + b"\x85\xc0\x74\xf5"  # test eax, eax; jz
    code = X2APIC + write(0x80F, 0x1FF) + pin + ready + wait + SHOW
    assert told(tmp_path, code, press_after=b"rdy\n") == [*words(b"rdy\n"), 1 << 1]
