"""What the software CPU does differently from KVM, or has to take care of where KVM need not."""

from __future__ import annotations

import ctypes
import struct
import threading

import pytest

from kvmd.hv.exits import Hypercall, Interrupted, MemoryFault, PortIo, Shutdown, UnsupportedInstruction
from kvmd.hv.vcpu import Vcpu
from tests.hv.conftest import CODE, TRIPPED, Bench

pytestmark = pytest.mark.software

COUNT = bytes.fromhex("f048ff0425 00000200 48ffc3 ebf2")  # 1: lock inc qword [0x20000]; inc rbx; jmp 1b
SLOT = 0x20000


def out(port: int, data: bytes) -> PortIo:
    return PortIo(port, len(data), 1, is_write=True, data=data)


def slot(bench: Bench) -> int:
    return int.from_bytes(ctypes.string_at(bench.ram + SLOT, 8), "little")


def test_no_instruction_is_executed_twice_by_a_kick(bench: Bench) -> None:
    """uc_emu_stop from another thread would repeat most of these additions."""
    vcpu = bench.start(COUNT)
    wanted = threading.Semaphore(0)
    stopping = threading.Event()

    def kick() -> None:
        while not stopping.is_set():
            wanted.acquire()
            vcpu.request_exit()

    kicker = threading.Thread(target=kick)
    kicker.start()
    for _ in range(200):
        wanted.release()
        assert vcpu.run() == Interrupted()
        vcpu.clear_exit_request()
        done = int(vcpu.registers().rip != CODE)
        assert slot(bench) == vcpu.registers().rbx + done
    stopping.set()
    wanted.release()
    kicker.join()
    assert slot(bench) > 0


def test_locked_instructions_of_several_vcpus_do_not_tear_each_other_apart(bench: Bench) -> None:
    # mov ecx, 200000; 1: lock inc qword [0x20000]; dec ecx; jnz 1b; out 0x10, al
    code = struct.pack("<BI", 0xB9, 200_000) + bytes.fromhex("f048ff0425 00000200 ffc9 75f3 e610")
    vcpus = [bench.start(code, index=index) for index in range(4)]
    exits = []
    threads = [threading.Thread(target=lambda vcpu=vcpu: exits.append(vcpu.run())) for vcpu in vcpus]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert exits == [out(0x10, b"\0")] * 4
    assert slot(bench) == 4 * 200_000


def test_a_vcpu_that_spins_does_not_keep_the_others_out(bench: Bench) -> None:
    # 1: cmp byte [0x20000], 0; je 1b; out 0x10, al
    waiting = bench.start(bytes.fromhex("803c25 00000200 00 74f6 e610"), index=0)
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(waiting.run()))
    thread.start()
    ctypes.memmove(bench.ram + CODE + 0x100, bytes.fromhex("c60425 00000200 01 e611"), 10)  # mov byte [0x20000], 1
    setting = start_at(bench, CODE + 0x100, index=1)
    assert setting.run() == out(0x11, b"\0")
    thread.join(20)
    assert found == [out(0x10, b"\0")]


def start_at(bench: Bench, address: int, index: int) -> Vcpu:
    """Return another vCPU that runs what is there already."""
    code = ctypes.string_at(bench.ram + CODE, 0x100)
    vcpu = bench.start(code, index=index)
    registers = vcpu.registers()
    vcpu.set_registers(type(registers)(rip=address, rsp=registers.rsp, rflags=registers.rflags))
    return vcpu


def test_code_that_another_vcpu_has_written_over_is_not_run_any_more(bench: Bench) -> None:
    """First the other one's own view of it: translations are each emulator's own."""
    runner = bench.start(bytes.fromhex("ffc3 e610 ebfa"))  # 1: inc ebx; out 0x10, al; jmp 1b
    for count in (1, 2):
        runner.run()
        assert runner.registers().rbx == count
    # mov word [CODE], 0xcbff (dec ebx); out 0x11, al
    ctypes.memmove(bench.ram + 0x18000, bytes.fromhex("66c70425 00000100 ffcb e611"), 12)
    writer = start_at(bench, 0x18000, index=1)
    assert writer.run() == out(0x11, b"\0")
    runner.run()
    assert runner.registers().rbx == 1


def test_code_that_its_own_vcpu_writes_is_run(bench: Bench) -> None:
    # Writes `inc ebx; ret` to 0x11000 and calls it, then `add ebx, 4; ret`, and calls that.
    code = "b800100100 66c70425 00100100 ffc3 c60425 02100100 c3 ffd0"
    code += "66c70425 00100100 83c3 66c70425 02100100 04c3 ffd0 e612"
    vcpu = bench.start(bytes.fromhex(code))
    assert isinstance(vcpu.run(), PortIo)
    assert vcpu.registers().rbx == 5


def test_a_page_that_was_converted_is_not_run_from_old_translations(bench: Bench) -> None:
    # call TRIPPED + 0x20000 twice
    code = struct.pack("<BI", 0xB8, TRIPPED + 0x20000) + bytes.fromhex("ffd0 e610 ffd0 e610")
    vcpu = bench.start(code)
    found = vcpu.run()
    assert isinstance(found, MemoryFault)
    assert found.private
    bench.make_private_live()
    bench.write_private(0x20000, bytes.fromhex("ffc3c3"))  # inc ebx; ret
    vcpu.run()
    bench.make_private_live()
    bench.write_private(0x20000, bytes.fromhex("ffcbc3"))  # dec ebx; ret
    vcpu.run()
    assert vcpu.registers().rbx == 0


def test_a_string_read_into_a_view_that_dies_meanwhile_faults_again(bench: Bench) -> None:
    bench.make_private_live()
    # mov edi, TRIPPED + 0x20000; mov dx, 0x60; insb; out 0x12, al
    vcpu = bench.start(struct.pack("<BI", 0xBF, TRIPPED + 0x20000) + bytes.fromhex("66ba6000 6c e612"))
    assert isinstance(vcpu.run(), PortIo)
    vcpu.complete_read(b"q")
    bench.make_shared_live()
    assert isinstance(vcpu.run(), MemoryFault)
    bench.make_private_live()
    assert vcpu.run() == out(0x12, b"\0")
    assert bench.read_private(0x20000, 1) == b"q"


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("c5f458c2", id="vaddps ymm"),
        pytest.param("c5f9efc0", id="vpxor xmm, which the emulator takes for pxor"),
        pytest.param("67c5f9efc0", id="the same with a prefix"),
        pytest.param("62f17c4858c1", id="AVX-512"),
        pytest.param("f30fc7f8", id="rdpid"),
        pytest.param("0f38c9c1", id="sha1msg1"),
    ],
)
def test_an_instruction_that_is_missing_is_named_with_its_address_and_bytes(bench: Bench, code: str) -> None:
    found = bench.start(b"\x90" + bytes.fromhex(code)).run()
    assert isinstance(found, UnsupportedInstruction)
    assert found.address == CODE + 1
    assert found.code.startswith(bytes.fromhex(code))


def test_bit_manipulation_has_a_vector_prefix_and_is_there(bench: Bench) -> None:
    # mov ecx, 0xf0; mov edx, 0xff; andn eax, ecx, edx; out 0x10, al
    vcpu = bench.start(bytes.fromhex("b9f0000000 baff000000 c4e270f2c2 e610"))
    assert vcpu.run() == out(0x10, b"\x0f")


def test_a_system_call_is_named_and_sysenter_faults(bench: Bench) -> None:
    found = bench.start(b"\x0f\x05").run()
    assert isinstance(found, UnsupportedInstruction)
    assert (found.address, found.code[:2]) == (CODE, b"\x0f\x05")
    assert bench.start(b"\x0f\x34").run() == Shutdown()


def test_hypercalls(bench: Bench) -> None:
    # mov eax, 12; mov ebx, 0x5000; mov ecx, 1; mov edx, 0x10; vmcall; out 0x12, eax
    code = bytes.fromhex("b80c000000 bb00500000 b901000000 ba10000000 0f01c1 e712")
    kernel = bench.start(code, cpl=0)
    assert kernel.run() == Hypercall(12, (0x5000, 1, 0x10))
    kernel.complete_hypercall(11)
    assert kernel.run() == out(0x12, b"\x0b\0\0\0")
    user = bench.start(code)
    assert user.run() == out(0x12, b"\xff\xff\xff\xff")
    unknown = bench.start(b"\xb8\x63" + code[2:], cpl=0)
    assert unknown.run() == out(0x12, struct.pack("<i", -1000))


def test_a_guest_that_changes_its_page_tables_is_followed(bench: Bench) -> None:
    # mov eax, 0x5000; mov cr3, rax; mov eax, [0x40000000]; out 0x10, al: a copy of the root without the second entry
    ctypes.memmove(bench.ram + 0x5000, struct.pack("<Q", 0x6007), 8)
    ctypes.memmove(bench.ram + 0x6000, struct.pack("<Q", 0x3007), 8)
    vcpu = bench.start(bytes.fromhex("b800500000 0f22d8 8b042500000040 e610"), cpl=0)
    assert vcpu.run() == Shutdown()
    assert vcpu.registers().rip == CODE + 8
