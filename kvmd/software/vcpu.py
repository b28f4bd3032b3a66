"""One vCPU of the software CPU: an emulator of its own, which runs when it has the turn."""

from __future__ import annotations

import errno as errno_codes
import threading
from dataclasses import replace
from typing import Literal

from kvmd.hv.exits import (
    EmulatorFailed,
    Exit,
    Halted,
    Hypercall,
    Interrupted,
    MemoryFault,
    Mmio,
    PortIo,
    Shutdown,
    UnsupportedInstruction,
)
from kvmd.hv.vcpu import Registers
from kvmd.software.attention import Attention
from kvmd.software.engine import INVALID_INSTRUCTION, RFLAGS_TF, UNMAPPED, Engine, told
from kvmd.software.instruction import LONGEST, hypercall_length, may_be_an_extension, string_io
from kvmd.software.interception import Ended, Interception
from kvmd.software.memory import GuestMemory, page_of, page_start
from kvmd.software.page_walk import Access
from kvmd.software.turns import Turns
from kvmd.software.vector_code import vector_instructions
from kvmd.units import PAGE_MASK, PAGE_SIZE

_INTERRUPTED = Interrupted()
_HYPERCALL_RESULTS = (0, errno_codes.EINVAL, errno_codes.EAGAIN)
_MAP_GPA_RANGE = 12
_NO_SUCH_HYPERCALL = -1000
"""-KVM_ENOSYS."""
_NOT_PERMITTED = -1
"""-KVM_EPERM: what KVM answers to CPL 3."""
_U64 = (1 << 64) - 1
_U32 = (1 << 32) - 1
_RFLAGS_DF = 1 << 10
_DWORD = 4
_HLT = 0xF4
_SYSCALL = b"\x0f\x05"


class SoftwareVcpu:
    """A vCPU; implements ``kvmd.hv.vcpu.Vcpu`` and ``kvmd.software.turns.Runner``.

    Args:
        index: its number.
        memory: of the machine.
        turns: of the machine.

    Raises:
        HostError: the emulator cannot be had.
    """

    def __init__(self, index: int, memory: GuestMemory, turns: Turns) -> None:
        self._index = index
        self._memory = memory
        self._turns = turns
        self._events = Interception(index, memory)
        self._emulator: Engine | None = Engine(memory.regions, memory.size_bytes, self._events)
        self._events.attach(self._emulator)
        self._attention = self._emulator.attention
        self._lock = threading.Lock()
        self._thread: int | None = None
        self._code_generation = 0
        self._stale = False
        self._read: PortIo | Mmio | Hypercall | None = None
        self._string_at: int | None = None
        self._store: tuple[int, bytes] | None = None

    @property
    def index(self) -> int:
        """The vCPU's number, from 0."""
        return self._index

    # --- the thread

    def prepare_thread(self) -> None:
        """Make the calling thread the one that runs this vCPU.

        Raises:
            RuntimeError: another thread runs it.
        """
        me = threading.get_ident()
        self._engine  # noqa: B018 - for its error
        with self._lock:
            if self._thread is not None and self._thread != me:
                raise RuntimeError(f"vCPU {self._index} is already run by another thread")
            self._thread = me

    def release_thread(self) -> None:
        """Undo ``prepare_thread`` in the same thread; harmless where nothing is to undo.

        Raises:
            RuntimeError: another thread runs it.
        """
        with self._lock:
            if self._thread is not None and self._thread != threading.get_ident():
                raise RuntimeError(f"vCPU {self._index} is run by another thread, which has to release it")
            self._thread = None

    # --- running

    def run(self) -> Exit:
        """Enter the guest when the turn comes, until it leaves, and say why. Releases the GIL meanwhile.

        A pending read or hypercall is completed first, even when an exit was requested.

        Raises:
            ValueError: the vCPU is closed.
        """
        engine = self._engine
        self._events.mmio.settle()
        self._read = None
        while True:
            if not self._turns.acquire(self, self._is_wanted_out):
                return _INTERRUPTED
            try:
                exit_ = self._take_turn(engine)
            finally:
                self._turns.release(self)
            if exit_ is not None:
                return exit_

    def request_exit(self) -> None:
        """Make the current or the next ``run`` return ``Interrupted``. From any thread."""
        self._attention.want(Attention.EXIT)
        self._turns.wake(self)

    def clear_exit_request(self) -> None:
        """Forget exit requests up to now: called after ``run``, before looking at commands."""
        self._attention.forget(Attention.EXIT)

    def preempt(self) -> None:
        """End the turn soon, since others wait."""
        self._attention.want(Attention.TURN)

    def begin_turn(self) -> None:
        """Forget what was asked for in an earlier turn."""
        self._attention.forget(Attention.TURN)

    def knows(self, first: int, end: int) -> bool:
        """Tell whether the emulator may touch a page of ``[first, end)`` without asking. Under the memory's lock."""
        return self._events.knows(first, end)

    def distrust(self) -> None:
        """Ask for all pages anew in the next turn. While it has none."""
        self._stale = True

    def complete_read(self, data: bytes) -> None:
        """Give the data that the pending ``PortIo`` or ``Mmio`` load reads.

        Raises:
            ValueError: no load is pending, or ``data`` has not its length.
        """
        engine, pending = self._engine, self._read
        if pending is None or isinstance(pending, Hypercall):
            raise ValueError(f"vCPU {self._index} has no pending read to complete")
        if len(data) != pending.size:
            raise ValueError(f"the pending read of vCPU {self._index} takes {pending.size} bytes, not {len(data)}")
        if isinstance(pending, Mmio):
            self._events.mmio.settle(data)
        elif self._string_at is not None:
            self._store = (self._string_at, data)
        else:
            value = int.from_bytes(data, "little")
            registers = engine.registers()
            kept = 0 if pending.size == _DWORD else registers.rax & ~((1 << 8 * pending.size) - 1)
            engine.set_registers(replace(registers, rax=kept | value))

    def complete_hypercall(self, result: int) -> None:
        """Give the result of the pending ``Hypercall``: 0, 22 (EINVAL) or 11 (EAGAIN).

        Raises:
            ValueError: no hypercall is pending, or no hypercall has such a result.
        """
        if result not in _HYPERCALL_RESULTS:
            raise ValueError(f"a hypercall returns one of {_HYPERCALL_RESULTS}, not {result}")
        if not isinstance(self._read, Hypercall):
            raise ValueError(f"vCPU {self._index} has no pending hypercall to complete")  # noqa: TRY004 - the protocol's
        self._engine.set_registers(replace(self._engine.registers(), rax=result))

    # --- registers

    def set_long_mode(self, *, cr3: int, cpl: int) -> None:
        """Put the vCPU into 64-bit mode; see ``kvmd.hv.vcpu.Vcpu.set_long_mode``.

        Raises:
            HostError: the emulator did not do it.
            ValueError: ``cpl`` is neither 0 nor 3.
        """
        if cpl not in (0, 3):
            raise ValueError(f"a guest starts at privilege level 0 or 3, not {cpl}")
        self._engine.set_long_mode(cr3=cr3, cpl=cpl)
        self._events.start_at(cr3=cr3, cpl=cpl)

    def registers(self) -> Registers:
        """Read the registers."""
        return self._engine.registers()

    def set_registers(self, registers: Registers) -> None:
        """Write the registers."""
        self._engine.set_registers(registers)

    def translate(self, address: int) -> int | None:
        """Walk the guest's page tables; the gpa carries the C-bit. None where nothing is mapped."""
        self._engine  # noqa: B018 - for its error
        page = self._events.translate(address)
        return None if page is None else page | address & PAGE_MASK

    def close(self) -> None:
        """Give up the vCPU once no thread runs it; harmless the second time."""
        with self._lock:
            self._thread = None
            self._emulator = None

    # --- one turn

    @property
    def _engine(self) -> Engine:
        if self._emulator is None:
            raise ValueError(f"vCPU {self._index} is used after it was closed")
        return self._emulator

    def _is_wanted_out(self) -> bool:
        """Whether an exit was requested, and the last exit's instruction is finished."""
        completing = self._store is not None or self._events.mmio.is_open
        return self._attention.is_wanted(Attention.EXIT) and not completing

    def _take_turn(self, engine: Engine) -> Exit | None:
        """Run until the guest leaves, and return why; None where the turn ended first."""
        code = self._memory.code
        if code.generation != self._code_generation or (code.mixed and self._turns.last is not self):
            self._code_generation = code.generation
            self._events.forget_code()
            engine.forget_code()
        if self._stale:
            self._forget_pages(engine)
        if self._store is not None:
            fault = self._finish_string(*self._store)
            if fault is not None:
                return fault
        if self._events.mmio.is_open:
            found = self._finish_mmio(engine)
            if found is not Ended.STEPPED:
                return found
        self._events.begin()
        error = engine.run(engine.rip)
        if error in UNMAPPED:
            self._events.begin()
            error = engine.run(engine.rip, explain=True)
        return self._why(engine, error)

    def _forget_pages(self, engine: Engine) -> None:
        self._stale = False
        engine.forget_pages()
        self._events.forget_pages()

    def _why(self, engine: Engine, error: int) -> Exit | None:
        """Return why the run ended; None where it was asked to."""
        ended = self._events.ended
        if isinstance(ended, Ended):
            return self._on_system_call() if ended is Ended.SYSTEM_CALL else self._untold(engine, error)
        if ended is None:
            return self._untold(engine, error)
        if isinstance(ended, PortIo):
            return self._on_port(engine, ended)
        if isinstance(ended, Mmio):
            self._events.mmio.tell(ended, engine.rip)
            self._read = None if ended.is_write else ended
        return ended

    def _untold(self, engine: Engine, error: int) -> Exit | None:
        """The run ended, and no hook was told why."""
        rip = engine.rip
        if error == INVALID_INSTRUCTION:
            return self._on_undefined(engine, rip)
        stopped = self._attention.take_stopped()
        if engine.is_watched(rip):
            return self._on_watched(engine, rip)
        if stopped:
            return None
        if engine.cpl() == 0 and self._code(rip - 1)[:1] == bytes([_HLT]):
            return Halted()
        return EmulatorFailed(rip, self._code(rip), told(error))

    # --- what the emulator leaves to kvmd

    def _on_port(self, engine: Engine, access: PortIo) -> PortIo:
        """The instruction is executed, but a repeated one not counted; what an IN reads is to be written yet."""
        string = string_io(self._code(self._events.port_at))
        self._string_at = None
        if string is not None:
            registers = engine.registers()
            mask = _U32 if string.narrow else _U64
            if not access.is_write:
                step = -access.size if registers.rflags & _RFLAGS_DF else access.size
                self._string_at = registers.rdi - step & mask
            if string.repeated:
                left = registers.rcx - 1 & mask
                rip = self._events.port_at if left else registers.rip
                engine.set_registers(replace(registers, rcx=left, rip=rip))
        self._read = None if access.is_write else access
        return access

    def _finish_string(self, address: int, data: bytes) -> Exit | None:
        """Store what an INS read, where its page is still live; else return the exit that an access there is."""
        memory = self._memory
        parts: list[tuple[int, bytes]] = []
        while data:
            room = PAGE_SIZE - (address & PAGE_MASK)
            page = self._events.translate(address, Access.WRITE)
            if page is None:
                return Shutdown()
            if memory.is_inside(page):
                parts.append((page | address & PAGE_MASK, data[:room]))
            address, data = address + room & _U64, data[room:]
        with memory.lock:
            for gpa, _ in parts:
                if not memory.is_live(gpa):
                    return MemoryFault(page_start(gpa), PAGE_SIZE, memory.is_private(gpa))
            for gpa, part in parts:
                memory.write(gpa, part)
                memory.code.overwrite(page_of(gpa), page_of(gpa) + 1)
        self._store = None
        return None

    def _finish_mmio(self, engine: Engine) -> Exit | Literal[Ended.STEPPED] | None:
        """Run the one instruction whose accesses were answered."""
        events = self._events
        registers = engine.registers()
        engine.set_registers(replace(registers, rflags=registers.rflags | RFLAGS_TF))
        events.begin(stepping=True)
        # Its answers are in pages that nothing else may see, and it is to be finished whoever waits.
        self._forget_pages(engine)
        with self._attention.deaf():
            error = engine.run(registers.rip, explain=True)
        after = engine.registers()
        engine.set_registers(replace(after, rflags=after.rflags & ~RFLAGS_TF | registers.rflags & RFLAGS_TF))
        self._forget_pages(engine)
        if not isinstance(events.ended, Mmio | MemoryFault):
            events.mmio.clear()
        return Ended.STEPPED if events.ended is Ended.STEPPED else self._why(engine, error)

    def _on_watched(self, engine: Engine, rip: int) -> Exit | None:
        if any(True for _ in vector_instructions(self._code(rip), 1)):
            return UnsupportedInstruction(rip, self._code(rip))
        engine.unwatch(rip)  # what was there has been written over
        return None

    def _on_undefined(self, engine: Engine, rip: int) -> Exit | None:
        code = self._code(rip)
        length = hypercall_length(code)
        if length:
            registers = engine.registers()
            is_kernel = engine.cpl() == 0
            result = _NO_SUCH_HYPERCALL if is_kernel else _NOT_PERMITTED
            engine.set_registers(replace(registers, rax=result & _U64, rip=registers.rip + length))
            if not is_kernel or registers.rax != _MAP_GPA_RANGE:
                return None
            self._read = Hypercall(_MAP_GPA_RANGE, (registers.rbx, registers.rcx, registers.rdx))
            return self._read
        if may_be_an_extension(code):
            return UnsupportedInstruction(rip, self._code(rip))
        return Shutdown()

    def _on_system_call(self) -> Exit:
        rip = self._events.port_at
        if self._code(rip)[:2] != _SYSCALL:
            return Shutdown()  # SYSENTER without a kernel's code segment
        return UnsupportedInstruction(rip, self._code(rip))

    def _code(self, address: int) -> bytes:
        """Return the bytes at a virtual address, as far as they can be read and no more than an instruction has."""
        found = b""
        while len(found) < LONGEST:
            here = address + len(found) & _U64
            page = self._events.code.get(page_start(here))
            if page is None:
                page = self._events.translate(here)
            count = min(LONGEST - len(found), PAGE_SIZE - (here & PAGE_MASK))
            data = None if page is None else self._memory.read(page | here & PAGE_MASK, count)
            if data is None:
                break
            found += data
        return found
