"""What is done about each exit: a scripted vCPU, a service that answers as told."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from kvmd.bell import Bell
from kvmd.conversion.livelock import FIRST_SAMPLE, SAMPLE_EVERY, STUCK_AFTER
from kvmd.conversion.messages import Answer, Cause, ConversionRequest, GuestResult, MmioAccess, Outcome
from kvmd.conversion.rate_limit import RateLimit
from kvmd.devices.console import ConsoleOutput
from kvmd.devices.mmio import MmioBus, MmioCounter
from kvmd.devices.ports import PortBus
from kvmd.devices.power import RESET_PORT, EndSwitch, GuestEnd, acpi_reset
from kvmd.devices.uart16550 import Uart16550
from kvmd.exit_handler import CONVERSION_PORT, EXIT_PORT, ExitHandler, Next, VcpuEnded, VcpuSurroundings
from kvmd.hv.exits import (
    BadMemoryFault,
    EmulationFailure,
    EmulatorFailed,
    Exit,
    FaultDefect,
    Halted,
    Hypercall,
    Interrupted,
    MemoryFault,
    Mmio,
    PortIo,
    Shutdown,
    SystemEvent,
    UnexpectedExit,
    UnsupportedInstruction,
)
from kvmd.hv.vcpu import Registers
from kvmd.ranges import GpaRange, PageState
from kvmd.stop import Stop, StopReason
from kvmd.units import MIB, PAGE_SIZE
from tests.fakes import C_BIT, FakeVcpu, RecordingProtection

MEMORY = 4 * MIB
PAGE = 2 * MIB
BELL = Bell()
"""Of all handlers: nobody here blocks."""

STOP = Stop.because(StopReason.MEMSLOTS_EXHAUSTED, "full")


@dataclass
class ScriptedService:
    """Answers requests as told, and keeps them."""

    answers: list[Answer] = field(default_factory=list)
    requests: list[ConversionRequest] = field(default_factory=list)
    sequence: int = 7

    def request(self, request: ConversionRequest, bell: Bell) -> Answer:
        """Answer at once."""
        assert bell is not None
        self.requests.append(request)
        return self.answers.pop(0) if self.answers else Answer(Outcome.CONVERTED)


class Rig:
    """A handler with everything around it."""

    def __init__(self, *answers: Answer, rate: RateLimit | None = None) -> None:
        self.service = ScriptedService(list(answers))
        self.console = ConsoleOutput()
        self.ports = PortBus()
        self.ports.add(0x3F8, 8, Uart16550(self.console))
        self.mmio = MmioCounter()
        self.vcpu = FakeVcpu(2, lambda vcpu: vcpu.spin())
        self.vcpu.current = Registers(rip=0x100040, rax=12)
        self.protection = RecordingProtection(MEMORY)
        around = VcpuSurroundings(self.service, self.protection, self.ports, self.mmio, rate=rate)
        self.handler = ExitHandler(self.vcpu, around, BELL)

    def answer(self, exit_: Exit) -> object:
        """Answer one exit of a vCPU that entered at change 7."""
        return self.handler.answer(exit_, 7)

    def stop(self, exit_: Exit) -> Stop:
        """Answer one exit that must stop the machine, with vCPU and registers in what it says."""
        stop = self.answer(exit_)
        assert isinstance(stop, Stop)
        assert (stop.vcpu, stop.registers) == (2, self.vcpu.current)
        return stop


def out(port: int, data: bytes, size: int = 1) -> PortIo:
    """Return an OUT of some accesses."""
    return PortIo(port, size, len(data) // size, is_write=True, data=data)


def test_a_fault_becomes_a_request_without_the_c_bit() -> None:
    rig = Rig()
    assert rig.answer(MemoryFault(PAGE | C_BIT, PAGE_SIZE, private=False)) is Next.ENTER
    assert rig.service.requests == [
        ConversionRequest(
            vcpu=2, cause=Cause.IMPLICIT, gpa=PAGE, size_bytes=PAGE_SIZE, to=PageState.PRIVATE, entered_at=7
        )
    ]


@pytest.mark.parametrize(
    "asking",
    [
        MemoryFault(PAGE, PAGE_SIZE, private=False),
        Mmio(PAGE, 4, is_write=True, data=b"abcd"),
        Hypercall(12, (PAGE, 1, 0)),
        out(0xC2, b"\x0c"),
    ],
)
def test_who_asks_is_due_when_the_machine_is(asking: Exit) -> None:
    rate = RateLimit(1)
    rig = Rig(rate=rate)
    rig.vcpu.current = Registers(rbx=PAGE, rcx=1)
    rig.answer(out(0x3F8, b"x"))
    rate.count(5_000_000_000)
    assert rig.handler.due_ns == 0, "who asks for nothing is never held back"
    rig.answer(asking)
    assert rig.handler.due_ns == rate.due_ns > 5_000_000_000


def test_without_a_rate_nobody_is_held_back() -> None:
    rig = Rig()
    rig.answer(MemoryFault(PAGE, PAGE_SIZE, private=False))
    assert rig.handler.due_ns == 0


def test_an_answer_that_stops_the_machine_ends_the_thread() -> None:
    stop = Rig(Answer(Outcome.FAILED, stop=STOP)).stop(MemoryFault(PAGE, PAGE_SIZE, private=False))
    assert (stop.reason, stop.message) == (STOP.reason, STOP.message)


def test_an_access_in_place_asks_for_nothing() -> None:
    rig = Rig()
    made: list[MmioAccess] = []

    def make(access: MmioAccess) -> bytes:
        made.append(access)
        return b"" if access.data is not None else bytes(range(access.size))

    rig.protection.in_place = make
    assert rig.answer(Mmio(PAGE + 8, 4, is_write=False, data=b"")) is Next.COMPLETE
    assert rig.vcpu.read == bytes(range(4))
    assert rig.answer(Mmio(PAGE, 2, is_write=True, data=b"ab")) is Next.COMPLETE
    assert made == [MmioAccess(PAGE + 8, 4, None), MmioAccess(PAGE, 2, b"ab")]
    assert rig.service.requests == []


def test_an_access_that_only_the_guest_can_make_stops_the_machine() -> None:
    rig = Rig()
    rig.protection.in_place = lambda _access: None
    stop = rig.stop(Mmio(PAGE | C_BIT, 8, is_write=False, data=b""))
    assert stop.reason is StopReason.EMULATION_FAILURE
    assert "an access to private memory" in stop.message
    assert "gpa 0x200000 size 0x8" in stop.message
    assert rig.service.requests == []


def test_a_fault_without_progress_is_diagnosed_by_the_protection() -> None:
    stuck = Stop.because(StopReason.NO_PROGRESS, "the same fault came back")
    stop = Rig(Answer(Outcome.FAILED, stop=stuck)).stop(MemoryFault(PAGE | 8, 16, private=False))
    assert stop.message == "the same fault came back: shared [0x200000, 0x201000) is a recording"


def test_an_interruption_is_forgotten_and_the_guest_entered_again() -> None:
    rig = Rig()
    rig.vcpu.request_exit()
    assert rig.answer(Interrupted()) is Next.ENTER
    assert not rig.vcpu._wanted_out.is_set()


def test_an_instruction_that_can_never_complete_is_noticed_by_its_registers() -> None:
    rig = Rig()
    most = FIRST_SAMPLE + SAMPLE_EVERY + STUCK_AFTER + 1
    for fault in range(most):
        outcome = rig.answer(MemoryFault(PAGE | (C_BIT if fault % 2 else 0), PAGE_SIZE, private=False))
        if isinstance(outcome, Stop):
            assert outcome.reason is StopReason.NO_PROGRESS
            assert "shared view" in outcome.message
            return
    pytest.fail("never noticed")


def test_console_output_and_a_port_nothing_answers() -> None:
    rig = Rig()
    assert rig.answer(out(0x3F8, b"hi")) is Next.COMPLETE
    assert rig.console.take() == b"hi"
    assert rig.answer(PortIo(0x3FD, 1, 1, is_write=False, data=b"")) is Next.COMPLETE
    assert rig.vcpu.read is not None
    assert rig.vcpu.read[0] & 0x20
    for size in (1, 2, 4):
        assert rig.answer(PortIo(0x80, size, 1, is_write=False, data=b"")) is Next.COMPLETE
        assert rig.vcpu.read == b"\xff" * size
    assert rig.answer(out(0x80, b"\1\2\3\4", 4)) is Next.COMPLETE
    assert rig.ports.unclaimed == 4


def test_rep_ins_reads_each_access_apart() -> None:
    rig = Rig()
    assert rig.answer(PortIo(0x3FD, 1, 3, is_write=False, data=b"")) is Next.COMPLETE
    assert rig.vcpu.read is not None
    assert len(rig.vcpu.read) == 3


@pytest.mark.parametrize("status", [0, 1, 119, 128, 255])
def test_the_exit_port_ends_the_vcpu(status: int) -> None:
    assert Rig().answer(out(EXIT_PORT, bytes([status]))) == VcpuEnded(status)


@pytest.mark.parametrize("status", range(120, 128))
def test_reserved_statuses_are_refused(status: int) -> None:
    assert Rig().stop(out(EXIT_PORT, bytes([status]))).reason is StopReason.RESERVED_STATUS


@pytest.mark.parametrize("result", GuestResult)
def test_the_conversion_port_takes_its_arguments_from_registers_and_answers_in_rax(result: GuestResult) -> None:
    rig = Rig(Answer(Outcome.CONVERTED, result))
    rig.vcpu.current = Registers(rax=12, rbx=PAGE, rcx=3, rdx=1 << 4, rip=0x100040)
    assert rig.answer(out(CONVERSION_PORT, b"\x0c")) is Next.COMPLETE
    (request,) = rig.service.requests
    assert (request.cause, request.gpa, request.size_bytes) == (Cause.EXPLICIT, PAGE, 3 * PAGE_SIZE)
    assert request.to is PageState.PRIVATE
    assert rig.vcpu.current == Registers(rax=int(result), rbx=PAGE, rcx=3, rdx=1 << 4, rip=0x100040)


def test_another_value_at_the_conversion_port_is_just_an_unclaimed_port() -> None:
    rig = Rig()
    assert rig.answer(out(CONVERSION_PORT, b"\x0b")) is Next.COMPLETE
    assert rig.service.requests == []
    assert rig.ports.unclaimed == 1


def test_a_hypercall_is_the_same_request() -> None:
    rig = Rig(Answer(Outcome.FAILED, GuestResult.EAGAIN))
    assert rig.answer(Hypercall(12, (PAGE, 1, 1))) is Next.COMPLETE
    assert rig.vcpu.hypercall_result == GuestResult.EAGAIN
    # A page-size hint of an SNP guest's 2 MiB request is not the private bit.
    assert rig.service.requests[0].to is PageState.SHARED


def test_an_unknown_hypercall_is_refused() -> None:
    rig = Rig()
    assert rig.answer(Hypercall(13, (0, 0, 0))) is Next.COMPLETE
    assert rig.vcpu.hypercall_result == GuestResult.EINVAL
    assert rig.service.requests == []


def test_mmio_in_memory_is_a_conversion_and_gets_its_data() -> None:
    rig = Rig(Answer(Outcome.CONVERTED, data=b"\1\2\3\4"))
    assert rig.answer(Mmio(PAGE + 8, 4, is_write=False, data=b"")) is Next.COMPLETE
    assert rig.vcpu.read == b"\1\2\3\4"
    assert rig.service.requests[0].access == MmioAccess(PAGE + 8, 4, None)
    assert rig.service.requests[0].to is PageState.SHARED
    assert rig.answer(Mmio(PAGE | C_BIT, 2, is_write=True, data=b"ab")) is Next.COMPLETE
    assert rig.service.requests[1].access == MmioAccess(PAGE, 2, b"ab")
    assert rig.service.requests[1].to is PageState.PRIVATE


@pytest.mark.parametrize("gpa", [MEMORY, MEMORY | C_BIT, C_BIT - 8])
def test_mmio_outside_memory_reads_all_ones_is_ignored_and_counted(gpa: int) -> None:
    rig = Rig()
    assert rig.answer(Mmio(gpa, 8, is_write=False, data=b"")) is Next.COMPLETE
    assert rig.vcpu.read == b"\xff" * 8
    assert rig.answer(Mmio(gpa, 1, is_write=True, data=b"x")) is Next.COMPLETE
    assert rig.mmio.unclaimed == 2
    assert rig.mmio.unclaimed_addresses == (gpa & ~C_BIT,)
    assert rig.service.requests == []


@pytest.mark.parametrize("defect", FaultDefect)
def test_a_bad_fault_is_never_a_conversion(defect: FaultDefect) -> None:
    rig = Rig()
    fault = BadMemoryFault(defect, gpa=PAGE | C_BIT, size=PAGE_SIZE, flags=0x18, errno=14)
    stop = rig.stop(fault)
    assert stop.reason.value == defect.value
    for part in (f"gpa {PAGE:#x}", "size 0x1000", "flags 0x18", "Bad address"):
        assert part in stop.message
    assert rig.service.requests == []


def test_a_bad_fault_without_an_address_says_so() -> None:
    stop = Rig().stop(BadMemoryFault(FaultDefect.NO_INFORMATION, gpa=None, size=None, flags=None, errno=14))
    assert "no address was given" in stop.message


@pytest.mark.parametrize(
    ("exit_", "reason"),
    [
        (Shutdown(), StopReason.TRIPLE_FAULT),
        (Halted(), StopReason.HALTED),
        (SystemEvent(3), StopReason.SYSTEM_EVENT),
        (UnexpectedExit("KVM_EXIT_FAIL_ENTRY", "hardware reason 5"), StopReason.UNEXPECTED_EXIT),
        (UnsupportedInstruction(0x100020, b"\xc5\xf9"), StopReason.UNSUPPORTED_INSTRUCTION),
        (EmulatorFailed(0x100020, b"", "out of memory"), StopReason.EMULATOR_FAILED),
    ],
)
def test_other_exits_stop_the_machine_by_name(exit_: Exit, reason: StopReason) -> None:
    assert Rig().stop(exit_).reason is reason


def test_a_fetch_from_a_view_that_is_not_live_converts_and_tries_again() -> None:
    rig = Rig()
    assert rig.answer(EmulationFailure(b"")) is Next.ENTER
    assert (rig.service.requests[0].gpa, rig.service.requests[0].to) == (0x100000, PageState.PRIVATE)


def test_an_instruction_that_kvm_cannot_emulate_stops_at_once() -> None:
    stop = Rig(Answer(Outcome.SPURIOUS)).stop(EmulationFailure(b"\x0f\xfc"))
    assert stop.reason is StopReason.EMULATION_FAILURE
    assert "0x100040 (0f fc)" in stop.message


def test_failed_fetches_while_memslots_change_are_bounded() -> None:
    rig = Rig(*[Answer(Outcome.SPURIOUS)] * 50)
    rig.service.sequence = 8  # something was converted since the vCPU entered
    outcomes = [rig.answer(EmulationFailure(b"")) for _ in range(10)]
    assert outcomes[0] is Next.ENTER
    assert isinstance(outcomes[-1], Stop)


def test_a_fetch_outside_memory_is_named() -> None:
    rig = Rig()
    rig.vcpu.current = Registers(rip=MEMORY)
    stop = rig.stop(EmulationFailure(b""))
    assert stop.reason is StopReason.FETCH_OUTSIDE_MEMORY
    assert f"gpa {MEMORY:#x}" in stop.message


class LinuxRig(Rig):
    """The same in a Linux machine: with devices on a bus, and a switch for its end."""

    def __init__(self) -> None:
        super().__init__()
        self.switch = EndSwitch()
        self.bus = MmioBus()
        self.ports.add(RESET_PORT, 1, acpi_reset(self.switch))
        around = VcpuSurroundings(self.service, self.protection, self.ports, self.mmio, self.bus, self.switch)
        self.handler = ExitHandler(self.vcpu, around, BELL)


class Register:
    """Remembers the last store, and reads as it."""

    def __init__(self) -> None:
        self.value = b"\1\2\3\4"
        self.offset = -1

    def read(self, offset: int, size_bytes: int) -> bytes:
        self.offset = offset
        return self.value[:size_bytes]

    def write(self, offset: int, data: bytes) -> None:
        self.offset, self.value = offset, data


def test_a_device_on_the_bus_answers_in_place_of_memory() -> None:
    rig, register = LinuxRig(), Register()
    rig.bus.add(GpaRange(PAGE, PAGE + PAGE_SIZE), register)
    assert rig.answer(Mmio(PAGE + 8, 4, is_write=False, data=b"")) is Next.COMPLETE
    assert (rig.vcpu.read, register.offset) == (b"\1\2\3\4", 8)
    assert rig.answer(Mmio(PAGE + 0x50, 2, is_write=True, data=b"ab")) is Next.COMPLETE
    assert (register.value, register.offset) == (b"ab", 0x50)
    assert rig.service.requests == []
    assert rig.mmio.unclaimed == 0


@pytest.mark.parametrize(
    ("wish", "reason", "status"),
    [
        (GuestEnd.POWER_OFF, StopReason.GUEST_POWER_OFF, 0),
        (GuestEnd.REBOOT, StopReason.GUEST_REBOOT, 133),
        (GuestEnd.PANIC, StopReason.GUEST_PANIC, 122),
    ],
)
def test_the_switch_ends_a_linux_machine(wish: GuestEnd, reason: StopReason, status: int) -> None:
    rig = LinuxRig()
    assert rig.answer(out(0x80, b"\0")) is Next.COMPLETE
    rig.switch.press(wish)
    stop = rig.stop(out(0x80, b"\0"))
    assert (stop.reason, stop.status) == (reason, status)


def test_a_reset_register_ends_it_at_once() -> None:
    assert LinuxRig().stop(out(RESET_PORT, b"\1")).reason is StopReason.GUEST_REBOOT


def test_the_payload_s_ports_mean_nothing_to_linux() -> None:
    rig = LinuxRig()
    assert rig.answer(out(EXIT_PORT, b"\7")) is Next.COMPLETE
    assert rig.answer(out(CONVERSION_PORT, b"\x0c")) is Next.COMPLETE
    assert rig.service.requests == []
    assert rig.ports.unclaimed_ports == (EXIT_PORT, CONVERSION_PORT)
