"""One Unicorn emulator, made into a 64-bit processor without firmware: what is Unicorn's own, and nothing of kvmd's.

Facts of Unicorn 2.1 that this relies on, each with a test in tests/software:

- UC_TLB_VIRTUAL: each page that its TLB misses is asked for (UC_HOOK_TLB_FILL). A refused one ends the run with the
  instruction not begun, so that it can be tried again.
- ``uc_emu_stop`` from another thread may stop an instruction half way, and is forgotten where it comes before the run:
  see ``kvmd.software.attention`` for what is done instead.
- ``uc_emu_stop`` within a hook ends the run at some later block, not after the instruction. What ends it there is a
  breakpoint of the processor's own: DR7 watches a port, which the hook of IN and OUT puts into DR0.
- Exceptions are never delivered to the guest: UC_HOOK_INTR is told their number.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar

from unicorn import unicorn_const as uc
from unicorn import x86_const as x86
from unicorn.unicorn_py3 import Uc, UcError
from unicorn.unicorn_py3 import unicorn as binding

from kvmd.errors import HostError
from kvmd.hv.vcpu import Registers
from kvmd.software.attention import Attention
from kvmd.units import MIB, PAGE_SIZE

_T = TypeVar("_T")

READ_UNMAPPED = uc.UC_MEM_READ_UNMAPPED

OK = uc.UC_ERR_OK
INVALID_INSTRUCTION = uc.UC_ERR_INSN_INVALID
REFUSED = uc.UC_ERR_EXCEPTION
UNMAPPED = frozenset({uc.UC_ERR_READ_UNMAPPED, uc.UC_ERR_WRITE_UNMAPPED, uc.UC_ERR_FETCH_UNMAPPED})

RFLAGS_TF = 1 << 8
"""Single step: an exception after each instruction."""

DEBUG_EXCEPTION = 1
"""The number of the exception that a breakpoint or a single step raises (#DB)."""

SPARE_GPA = 1 << 51
"""Guest-physical addresses of the emulator's own, above any that a guest can name (``kvmd.payload.boot``: the C-bit is
below, and no memory is as large)."""

SPARE_PAGES = 8

_TRANSLATIONS_BYTES = 32 * MIB
"""For translated code. Unicorn's own choice is 1 GiB of addresses for each vCPU."""

_STUB_PAGE = 0x1000
"""The virtual address of the code that sets the processor up, in a run in which every page is this one."""

_SET_UP_KERNEL = bytes.fromhex("0f23f8 0f0b")  # mov dr7, rax; ud2
_SET_UP_USER = bytes.fromhex("0f23f8 480f07")  # mov dr7, rax; sysretq
_DR7_WATCH_PORT = 0x400 | 1 << 1 | 2 << 16  # bit 10 is always set; G0; R/W0 = I/O
_MSR_EFER, _MSR_STAR = 0xC000_0080, 0xC000_0081
_EFER = 1 << 0 | 1 << 8 | 1 << 10 | 1 << 11  # SCE, LME, LMA, NXE: as kvmd.kvm.segments
_STAR = 0x23 << 48  # SYSRET loads CS with 0x33 and SS with 0x2b
_CR0 = 0x8005_0033  # PG, AM, WP, NE, ET, MP, PE: as kvmd.kvm.segments
_CR4 = 1 << 5 | 1 << 9 | 1 << 10 | 1 << 3  # PAE, OSFXSR, OSXMMEXCPT, and DE for the breakpoint on ports

_GENERAL = (
    *(x86.UC_X86_REG_RAX, x86.UC_X86_REG_RBX, x86.UC_X86_REG_RCX, x86.UC_X86_REG_RDX),
    *(x86.UC_X86_REG_RSI, x86.UC_X86_REG_RDI, x86.UC_X86_REG_RSP, x86.UC_X86_REG_RBP),
    *(x86.UC_X86_REG_R8, x86.UC_X86_REG_R9, x86.UC_X86_REG_R10, x86.UC_X86_REG_R11),
    *(x86.UC_X86_REG_R12, x86.UC_X86_REG_R13, x86.UC_X86_REG_R14, x86.UC_X86_REG_R15),
    *(x86.UC_X86_REG_RIP, x86.UC_X86_REG_RFLAGS),
)
"""In the order of ``Registers``."""


_CPUID_RESULTS = (x86.UC_X86_REG_RAX, x86.UC_X86_REG_RBX, x86.UC_X86_REG_RCX, x86.UC_X86_REG_RDX)


def told(error: int) -> str:
    """Return what an error of the emulator's means."""
    return f"{UcError(error)}"


class Events(Protocol):
    """What an emulator asks and tells while it runs, in the thread that runs it."""

    def fill(self, address: int, access: int) -> tuple[int, int] | None:
        """Return the gpa of the page at a virtual address and what may be done with it; None to end the run."""

    def on_in(self, port: int, size: int) -> None:
        """An IN or INS is being executed; its result is written afterwards. The run ends after it."""

    def on_out(self, port: int, size: int, value: int) -> None:
        """An OUT or OUTS is being executed. The run ends after it."""

    def on_unmapped(self, access: int, gpa: int, size: int, value: int) -> None:
        """An access to a page that was allowed, though nothing is there. The run ends before it."""

    def on_exception(self, number: int) -> None:
        """An exception or a software interrupt. The run ends."""

    def on_system_call(self) -> None:
        """A SYSCALL, which the emulator takes for a NOP."""

    def cpuid(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        """Return EAX, EBX, ECX and EDX of CPUID."""


class Engine:
    """An emulator. Everything but ``attention`` belongs to the thread that runs it.

    Args:
        regions: the gpa and the host address of memory.
        size_bytes: of each region.
        events: asked and told.

    Attributes:
        attention: how other threads get it to stop.

    Raises:
        HostError: the emulator cannot be had.
    """

    def __init__(self, regions: Iterable[tuple[int, int]], size_bytes: int, events: Events) -> None:
        self.attention = Attention()
        self._events = events
        self._watched: set[int] = set()
        self._setting_up = False
        self._problem: BaseException | None = None
        try:
            self._uc = Uc(uc.UC_ARCH_X86, uc.UC_MODE_64)
            self._uc.ctl_set_tcg_buffer_size(_TRANSLATIONS_BYTES)
            self._uc.ctl_set_tlb_mode(uc.UC_TLB_VIRTUAL)
            # No address ends a run but those in ``watch``: 0 is one like any other.
            self._uc.ctl_exits_enabled(True)  # noqa: FBT003 - Unicorn's way
            self._uc.ctl_set_exits([])
            for gpa, address in regions:
                self._uc.mem_map_ptr(gpa, size_bytes, uc.UC_PROT_ALL, address)
            self._uc.mem_map(SPARE_GPA, SPARE_PAGES * PAGE_SIZE, uc.UC_PROT_ALL)
            self._hook()
        except UcError as error:
            raise HostError(f"the software CPU cannot be set up: {error}") from error

    # --- running

    def run(self, rip: int, *, explain: bool = False) -> int:
        """Run from ``rip`` until something ends it, and return Unicorn's error number. Releases the GIL meanwhile.

        Args:
            rip: where.
            explain: tell of accesses to where nothing is (``Events.on_unmapped``), not only that there was one. With
                this hook, stores to memory are ten times slower.
        """
        hook = self._uc.hook_add(uc.UC_HOOK_MEM_UNMAPPED, self._on_unmapped) if explain else None
        try:
            self._uc.emu_start(rip, 0)
        except UcError as error:
            found = int(error.errno)
        else:
            found = OK
        finally:
            if hook is not None:
                self._uc.hook_del(hook)
                # What was translated meanwhile is slow.
                self.forget_code()
        if self._problem is not None:
            problem, self._problem = self._problem, None
            raise problem
        return found

    def forget_pages(self) -> None:
        """Ask for every page anew."""
        self._uc.ctl(uc.UC_CTL_TLB_FLUSH, uc.UC_CTL_IO_WRITE)

    def forget_code(self) -> None:
        """Translate all code anew."""
        self._uc.ctl_flush_tb()

    def watch(self, addresses: Iterable[int]) -> None:
        """End every run that reaches one of these virtual addresses, too. In a hook or between runs."""
        before = len(self._watched)
        self._watched.update(addresses)
        if len(self._watched) != before:
            self._uc.ctl_set_exits(list(self._watched))

    def unwatch(self, address: int) -> None:
        """Take back ``watch`` for one address. Between runs."""
        self._watched.discard(address)
        self._uc.ctl_set_exits(list(self._watched))
        self.forget_code()

    def is_watched(self, address: int) -> bool:
        """Tell whether ``watch`` was told of a virtual address."""
        return address in self._watched

    # --- registers

    def set_long_mode(self, *, cr3: int, cpl: int) -> None:
        """Enter 64-bit mode at a privilege level; the general registers are undefined afterwards.

        Raises:
            HostError: the emulator did not do it.
        """
        emulator = self._uc
        emulator.reg_write(x86.UC_X86_REG_MSR, (_MSR_EFER, _EFER))
        emulator.reg_write(x86.UC_X86_REG_MSR, (_MSR_STAR, _STAR))
        emulator.reg_write(x86.UC_X86_REG_CR4, _CR4)
        emulator.reg_write(x86.UC_X86_REG_CR0, _CR0)
        emulator.reg_write(x86.UC_X86_REG_CR3, cr3)
        emulator.mem_write(SPARE_GPA, _SET_UP_USER if cpl else _SET_UP_KERNEL)
        emulator.reg_write(x86.UC_X86_REG_RAX, _DR7_WATCH_PORT)
        emulator.reg_write(x86.UC_X86_REG_RCX, 0)
        emulator.reg_write(x86.UC_X86_REG_R11, 0x2)
        self._setting_up = True
        try:
            self.run(_STUB_PAGE)
        finally:
            self._setting_up = False
            self.forget_pages()
            self.forget_code()
        if self.cpl() != cpl or emulator.reg_read(x86.UC_X86_REG_DR7) != _DR7_WATCH_PORT:
            raise HostError("the software CPU did not enter 64-bit mode: use another version of unicorn")

    def registers(self) -> Registers:
        """Read the general registers."""
        return Registers(*self._uc.reg_read_batch(_GENERAL))

    def set_registers(self, registers: Registers) -> None:
        """Write the general registers."""
        r = registers
        values = (
            *(r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rsp, r.rbp),
            *(r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15),
            *(r.rip, r.rflags),
        )
        self._uc.reg_write_batch(tuple(zip(_GENERAL, values, strict=True)))

    @property
    def rip(self) -> int:
        """The instruction pointer."""
        return int(self._uc.reg_read(x86.UC_X86_REG_RIP))

    @rip.setter
    def rip(self, value: int) -> None:
        self._uc.reg_write(x86.UC_X86_REG_RIP, value)

    def cr3(self) -> int:
        """Return the root of the page tables, C-bit included."""
        return int(self._uc.reg_read(x86.UC_X86_REG_CR3))

    def cpl(self) -> int:
        """Return the privilege level."""
        return int(self._uc.reg_read(x86.UC_X86_REG_CS)) & 3

    def fill_spare(self, index: int, data: bytes) -> int:
        """Write a page of the emulator's own, and return its gpa."""
        gpa = SPARE_GPA + index * PAGE_SIZE
        self._uc.mem_write(gpa, data)
        return gpa

    # --- hooks: Unicorn's binding would lose what they raise, or raise it much later

    def _hook(self) -> None:
        self._hook_blocks()
        add = self._uc.hook_add
        add(uc.UC_HOOK_TLB_FILL, self._on_fill)
        add(uc.UC_HOOK_INTR, self._on_exception)
        add(uc.UC_HOOK_INSN, self._on_in, None, 1, 0, x86.UC_X86_INS_IN)
        add(uc.UC_HOOK_INSN, self._on_out, None, 1, 0, x86.UC_X86_INS_OUT)
        add(uc.UC_HOOK_INSN, self._on_system_call, None, 1, 0, x86.UC_X86_INS_SYSCALL)
        add(uc.UC_HOOK_INSN, self._on_system_call, None, 1, 0, x86.UC_X86_INS_SYSENTER)
        add(uc.UC_HOOK_INSN, self._on_cpuid, None, 1, 0, x86.UC_X86_INS_CPUID)

    def _hook_blocks(self) -> None:
        # Past the binding, which knows hooks in Python only. Begin above end: everywhere.
        attention = self.attention
        error = binding.uclib.uc_hook_add(
            self._uc._uch,  # noqa: SLF001 - the handle has no other name
            ctypes.byref(ctypes.c_size_t()),
            uc.UC_HOOK_BLOCK,
            ctypes.c_void_p(attention.hook_address),
            ctypes.c_void_p(attention.data_address),
            ctypes.c_uint64(1),
            ctypes.c_uint64(0),
        )
        if error != uc.UC_ERR_OK:
            raise UcError(error)

    def _on_fill(self, _uc: object, address: int, access: int, entry: Any, _data: object) -> bool:
        if self._setting_up:
            found = (SPARE_GPA, uc.UC_PROT_ALL) if address == _STUB_PAGE else None
        else:
            found = self._asked(self._events.fill, address, access)
        if found is None:
            return False
        entry.paddr, entry.perms = found
        return True

    def _on_exception(self, _uc: object, number: int, _data: object) -> None:
        if not self._setting_up:
            self._asked(self._events.on_exception, number)
        self._uc.emu_stop()

    def _on_unmapped(self, _uc: object, access: int, gpa: int, size: int, value: int, _data: object) -> bool:
        self._asked(self._events.on_unmapped, access, gpa, size, value)
        return False

    def _on_in(self, _uc: object, port: int, size: int, _data: object) -> int:
        self._asked(self._events.on_in, port, size)
        self._uc.reg_write(x86.UC_X86_REG_DR0, port)
        return 0

    def _on_out(self, _uc: object, port: int, size: int, value: int, _data: object) -> None:
        self._asked(self._events.on_out, port, size, value)
        self._uc.reg_write(x86.UC_X86_REG_DR0, port)

    def _on_system_call(self, _uc: object, _data: object) -> None:
        self._asked(self._events.on_system_call)
        self._uc.emu_stop()

    def _on_cpuid(self, _uc: object, _data: object) -> int:
        leaf, subleaf = self._uc.reg_read_batch((x86.UC_X86_REG_EAX, x86.UC_X86_REG_ECX))
        values = self._asked(self._events.cpuid, leaf, subleaf)
        if values is not None:
            self._uc.reg_write_batch(tuple(zip(_CPUID_RESULTS, values, strict=True)))
        return 1

    def _asked(self, question: Callable[..., _T], *arguments: int) -> _T | None:
        """Ask, and keep what is raised for the end of the run."""
        try:
            return question(*arguments)
        except BaseException as error:  # noqa: BLE001 - raised again by ``run``
            self._problem = self._problem or error
            self._uc.emu_stop()
            return None
