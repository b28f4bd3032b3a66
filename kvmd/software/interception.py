"""What one vCPU's emulator may touch, and why it stopped: the answers to its questions while it runs."""

from __future__ import annotations

import enum

from kvmd.hv.exits import EmulationFailure, MemoryFault, Mmio, PortIo, Shutdown
from kvmd.software.code_pages import READ, WRITE, within
from kvmd.software.cpuid import cpuid
from kvmd.software.engine import DEBUG_EXCEPTION, READ_UNMAPPED, SPARE_GPA, Engine
from kvmd.software.memory import GuestMemory, page_of, page_start
from kvmd.software.mmio import MmioAccesses
from kvmd.software.page_walk import Access, walk
from kvmd.software.vector_code import BEYOND, vector_instructions
from kvmd.units import PAGE_SIZE

_MOST_WALKED = 4096
"""Translations that are kept, at most: about 1 MiB."""


class Ended(enum.Enum):
    """Why a run ended, where that is no exit."""

    STEPPED = "stepped"
    """The one instruction that it was to run is done."""
    SYSTEM_CALL = "system-call"


class Interception:
    """Answers one emulator (``kvmd.software.engine.Events``), in the thread that runs it.

    Args:
        index: the vCPU's number.
        memory: of the machine.

    Attributes:
        ended: why the last run ended, as far as this was told.
        port_at: where the instruction is whose port access ended the run.
        code: the virtual addresses of pages that were executed since the pages were forgotten, and their gpas.
        mmio: the instruction that is being completed.
    """

    def __init__(self, index: int, memory: GuestMemory) -> None:
        self.ended: PortIo | Mmio | MemoryFault | EmulationFailure | Shutdown | Ended | None = None
        self.port_at = 0
        self.code: dict[int, int] = {}
        self.mmio = MmioAccesses()
        self._index = index
        self._memory = memory
        self._engine: Engine
        self._cr3: int | None = None
        self._stepping = False
        self._spare: dict[int, int] = {}
        self._looked_at: set[tuple[int, int]] = set()
        self._known: set[int] = set()
        self._walked: dict[tuple[int, int], int] = {}

    def attach(self, engine: Engine) -> None:
        """Say which emulator asks."""
        self._engine = engine

    def start_at(self, *, cr3: int, cpl: int) -> None:
        """Note how the processor was set up. What CPL 3 cannot change need not be asked for each time."""
        self._cr3 = cr3 if cpl else None

    def begin(self, *, stepping: bool = False) -> None:
        """Forget the last run.

        Args:
            stepping: the next one is of one instruction.
        """
        self.ended = None
        self._stepping = stepping
        self._spare.clear()
        if stepping:
            for index, (page, contents) in enumerate(self.mmio.loads()):
                self._spare[page] = self._engine.fill_spare(1 + index, contents)

    def forget_pages(self) -> None:
        """The emulator knows no page any more."""
        with self._memory.lock:
            self._known.clear()
        self.code.clear()

    def knows(self, first: int, end: int) -> bool:
        """Tell whether the emulator may touch a page of ``[first, end)`` without asking. Under the memory's lock."""
        return bool(within(self._known, first, end))

    def forget_code(self) -> None:
        """Look at all code again: some was changed."""
        self._looked_at.clear()

    def translate(self, address: int, access: Access = Access.READ) -> int | None:
        """Return the gpa of the page at a virtual address, or None where an access is a page fault."""
        if self._cr3 is not None:
            # CPL 3 cannot invalidate a translation, so one that was walked once may be kept like in any TLB.
            key = page_start(address), access
            found = self._walked.get(key)
            if found is None:
                found = walk(self._memory.read_entry, self._cr3, address, access, user=True)
                if found is not None:
                    if len(self._walked) >= _MOST_WALKED:
                        self._walked.clear()
                    self._walked[key] = found
            return found
        engine = self._engine
        return walk(self._memory.read_entry, engine.cr3(), address, access, user=engine.cpl() != 0)

    # --- asked by the emulator

    def fill(self, address: int, access: int) -> tuple[int, int] | None:
        """Return the page at a virtual address, or None to end the run."""
        kind = Access(access)
        gpa = self.translate(address, kind)
        if gpa is None:
            self.ended = Shutdown()
            return None
        memory = self._memory
        if not memory.is_inside(gpa):
            return self._outside(gpa, kind)
        page = page_of(gpa)
        with memory.lock:
            allowed = memory.code.touch(page, kind) if memory.is_live(gpa) else 0
            if allowed:
                self._known.add(page)
        if not allowed:
            self.ended = MemoryFault(gpa, PAGE_SIZE, memory.is_private(gpa))
            return None
        if kind is Access.FETCH:
            self.code[page_start(address)] = gpa
            self._look_at(page_start(address), gpa)
        return gpa, allowed

    def on_in(self, port: int, size: int) -> None:
        """Note the access."""
        self.port_at = self._engine.rip
        self.ended = PortIo(port, size, 1, is_write=False, data=b"")

    def on_out(self, port: int, size: int, value: int) -> None:
        """Note the access."""
        self.port_at = self._engine.rip
        self.ended = PortIo(port, size, 1, is_write=True, data=_bytes(value, size))

    def on_unmapped(self, access: int, gpa: int, size: int, value: int) -> None:
        """Note the access."""
        is_write = access != READ_UNMAPPED
        self.ended = Mmio(gpa, size, is_write, _bytes(value, size) if is_write else b"")

    def on_exception(self, number: int) -> None:
        """Note a triple fault, unless this was expected."""
        if isinstance(self.ended, PortIo):
            return  # the breakpoint that ends the run after the access
        self.ended = Ended.STEPPED if self._stepping and number == DEBUG_EXCEPTION else Shutdown()

    def on_system_call(self) -> None:
        """Note it."""
        self.port_at = self._engine.rip
        self.ended = Ended.SYSTEM_CALL

    def cpuid(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        """Answer for this vCPU."""
        return cpuid(self._index, leaf, subleaf)

    def _look_at(self, start: int, gpa: int) -> None:
        """Before a page of code is translated: find what the emulator would get wrong."""
        if (start, gpa) in self._looked_at and page_of(gpa) not in self._memory.code.mixed:
            return
        self._looked_at.add((start, gpa))
        contents = self._memory.read(gpa, PAGE_SIZE) or b""
        following = self.translate(start + PAGE_SIZE)
        if following is not None:
            contents += self._memory.read(following, BEYOND) or b""
        self._engine.watch(start + offset for offset in vector_instructions(contents, PAGE_SIZE))

    def _outside(self, gpa: int, access: Access) -> tuple[int, int] | None:
        """Let the emulator find nothing at an address that nothing backs, unless its instruction is being completed."""
        if access is Access.FETCH:
            self.ended = EmulationFailure(b"")
            return None
        if access is Access.READ:
            return self._spare.get(gpa, gpa), READ
        if self._stepping and self.mmio.takes_store(gpa):
            return SPARE_GPA, WRITE
        return gpa, WRITE


def _bytes(value: int, size: int) -> bytes:
    return (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")
