"""How an emulator is stopped between two instructions: a few machine instructions of kvmd's own, run before each block.

``uc_emu_stop`` from another thread ends a run after the next access to memory, in the middle of its instruction, which
is then executed a second time by the next run: a ``lock inc`` counts twice. Only at the start of a block of guest code
does it stop cleanly, and calling Python there would cost a thousand times the block. So Unicorn's hook for blocks calls
these instructions; they look at a few bytes and call ``uc_emu_stop`` where it is wanted.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
from collections.abc import Iterator
from contextlib import contextmanager

from unicorn.unicorn_py3 import unicorn as binding

from kvmd.errors import HostError

# Bytes 0 to 2: anything set there stops the emulator, unless it is deaf.
_DEAF = 3
_STOPPED = 4
_SIZE_BYTES = 8

# void hook(uc_engine *uc (rdi), uint64_t address, uint32_t size, void *attention (rcx)): System V ABI, x86-64.
_CODE = bytes.fromhex(
    "8b01"  # mov eax, [rcx]
    "ffc8"  # dec eax
    "3dffffff00"  # cmp eax, 0x00ffffff: below it where something is wanted and the emulator is not deaf
    "7201"  # jb 1f
    "c3"  # ret
    "c6410401"  # 1: mov byte [rcx + 4], 1
    "48b8"  # mov rax, uc_emu_stop
)
_JUMP = bytes.fromhex("ffe0")  # jmp rax: uc is still in rdi


class Attention:
    """What one emulator has to look at, in bytes that any thread may write.

    Raises:
        HostError: the host's processor has another machine language, or its kernel lets no code be made.
    """

    EXIT = 0
    """Somebody wants the vCPU out of the guest."""
    TURN = 1
    """Somebody else waits for the turn."""

    def __init__(self) -> None:
        if platform.machine() != "x86_64":
            raise HostError(f"the software CPU needs a host of type x86_64, not {platform.machine()}")
        self._bytes = (ctypes.c_ubyte * _SIZE_BYTES)()
        target = ctypes.cast(binding.uclib.uc_emu_stop, ctypes.c_void_p).value or 0
        code = _CODE + target.to_bytes(8, "little") + _JUMP
        try:
            self._page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        except OSError as error:
            raise HostError(f"the software CPU has to make machine code, which this host forbids: {error}") from error
        self._page[: len(code)] = code

    @property
    def hook_address(self) -> int:
        """The address of the hook's code."""
        return ctypes.addressof(ctypes.c_ubyte.from_buffer(self._page))

    @property
    def data_address(self) -> int:
        """The address of the bytes that it looks at."""
        return ctypes.addressof(self._bytes)

    def want(self, what: int) -> None:
        """Have the emulator stop before its next block, until ``forget``. From any thread; never blocks."""
        self._bytes[what] = 1

    def forget(self, what: int) -> None:
        """Take back ``want``."""
        self._bytes[what] = 0

    def is_wanted(self, what: int) -> bool:
        """Tell whether the emulator is to stop."""
        return bool(self._bytes[what])

    @contextmanager
    def deaf(self) -> Iterator[None]:
        """Let the emulator run on meanwhile, whatever is wanted."""
        self._bytes[_DEAF] = 1
        try:
            yield
        finally:
            self._bytes[_DEAF] = 0

    def take_stopped(self) -> bool:
        """Tell whether the emulator was stopped since this was asked last."""
        stopped = bool(self._bytes[_STOPPED])
        self._bytes[_STOPPED] = 0
        return stopped
