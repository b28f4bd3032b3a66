"""Stand-ins for what kvmd runs on: each passes the same contract tests as the real thing, or is only a recorder."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from kvmd.conversion.changes import Failure
from kvmd.conversion.messages import MmioAccess
from kvmd.errors import BackendError
from kvmd.hv.exits import Exit, Interrupted, MemoryFault
from kvmd.hv.vcpu import Registers
from kvmd.protection.base import Applied
from kvmd.ranges import GpaRange, PageState
from kvmd.units import PAGE_SIZE

C_BIT = 1 << 45


@dataclass
class RecordingProtection:
    """Protection that keeps both sides of memory in a dictionary and writes down what it was asked to do."""

    size_bytes: int
    log: list[tuple[str, GpaRange, PageState]] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    fail_apply: deque[Applied] = field(default_factory=deque)
    fail_discard: deque[bool] = field(default_factory=deque)
    in_place: Callable[[MmioAccess], bytes | None] | None = None
    before_apply: Callable[[GpaRange], None] | None = None

    def __post_init__(self) -> None:
        self.sides: dict[PageState, dict[int, bytes]] = {side: {} for side in PageState}

    def locate(self, gpa: int) -> tuple[int, PageState | None]:
        """Split off the C-bit."""
        plain = gpa & ~C_BIT
        if plain >= self.size_bytes:
            return plain, None
        return plain, PageState.PRIVATE if gpa & C_BIT else PageState.SHARED

    def wanted(self, fault: MemoryFault) -> tuple[int, PageState]:
        """Return what the C-bit says."""
        return fault.gpa & ~C_BIT, PageState.PRIVATE if fault.gpa & C_BIT else PageState.SHARED

    def apply(self, range_: GpaRange, to: PageState) -> Applied:
        """Write it down, or fail as told."""
        if self.before_apply is not None:
            self.before_apply(range_)
        self.threads.append(threading.get_ident())
        if self.fail_apply:
            return self.fail_apply.popleft()
        self.log.append(("apply", range_, to))
        return Applied(range_.end)

    def discard(self, range_: GpaRange, side: PageState) -> None:
        """Forget the side's bytes, or fail as told."""
        if self.fail_discard and self.fail_discard.popleft():
            raise BackendError("discard refused", 5)
        self.log.append(("discard", range_, side))
        for gpa in [gpa for gpa in self.sides[side] if range_.start <= gpa < range_.end]:
            del self.sides[side][gpa]

    def asks_by_address(self) -> bool:
        """Tell that the C-bit asks, unless accesses are made in place."""
        return self.in_place is None

    def access(self, state: PageState, access: MmioAccess) -> bytes:
        """Read or write single bytes of a side."""
        if access.data is None:
            return b"".join(self.sides[state].get(access.gpa + index, b"\0") for index in range(access.size))
        for index, value in enumerate(access.data):
            self.sides[state][access.gpa + index] = bytes([value])
        return b""

    def access_in_place(self, access: MmioAccess) -> bytes | None:
        """Answer as told."""
        return None if self.in_place is None else self.in_place(access)

    def diagnose(self, range_: GpaRange, state: PageState) -> str:
        """Return something to look for."""
        return f"{state.value} {range_} is a recording"

    def facts(self) -> dict[str, object]:
        """Return nothing of interest."""
        return {"protection": "recording"}


def failed(range_: GpaRange, failure: Failure, *, pages: int = 0) -> Applied:
    """Return the outcome of a change of ``range_`` that came ``pages`` far."""
    return Applied(range_.start + pages * PAGE_SIZE, failure)


class FakeVcpu:
    """A vCPU whose guest is a Python function: it gets the vCPU and returns the next exit.

    Args:
        index: its number.
        guest: called by ``run`` with the vCPU; returns why the guest left.
    """

    def __init__(self, index: int, guest: Callable[[FakeVcpu], Exit]) -> None:
        self._index = index
        self._guest = guest
        self._wanted_out = threading.Event()
        self.kicks = 0
        self.entries = 0
        self.inside = False
        self.read: bytes | None = None
        self.hypercall_result: int | None = None
        self.current = Registers()
        self.prepared: int | None = None
        self.released = threading.Event()

    @property
    def index(self) -> int:
        """The vCPU's number."""
        return self._index

    def prepare_thread(self) -> None:
        """Note the thread."""
        self.prepared = threading.get_ident()

    def release_thread(self) -> None:
        """Note that it was given back by the thread that took it."""
        assert self.prepared == threading.get_ident()
        self.released.set()

    def run(self) -> Exit:
        """Ask the guest, unless an exit was requested."""
        assert self.prepared == threading.get_ident(), "a vCPU is run by its own thread"
        self.entries += 1
        if self._wanted_out.is_set():
            return Interrupted()
        self.inside = True
        try:
            return self._guest(self)
        finally:
            self.inside = False

    def spin(self) -> Exit:
        """Stay in the guest until kicked: what a guest function returns to do nothing."""
        self._wanted_out.wait()
        return Interrupted()

    def request_exit(self) -> None:
        """Kick."""
        self.kicks += 1
        self._wanted_out.set()

    def clear_exit_request(self) -> None:
        """Forget kicks."""
        self._wanted_out.clear()

    def complete_read(self, data: bytes) -> None:
        """Keep what the guest reads."""
        self.read = data

    def complete_hypercall(self, result: int) -> None:
        """Keep the result."""
        self.hypercall_result = result

    def set_long_mode(self, *, cr3: int, cpl: int) -> None:
        """Do nothing."""

    def registers(self) -> Registers:
        """Return the registers."""
        return self.current

    def set_registers(self, registers: Registers) -> None:
        """Set the registers."""
        self.current = registers

    def translate(self, address: int) -> int | None:
        """Map every address to its private view."""
        return address | C_BIT

    def close(self) -> None:
        """Do nothing."""
