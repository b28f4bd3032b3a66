"""Emulated protection: two views of guest memory by one address bit, one of them live, the other a tripwire.

The C-bit of a guest-physical address chooses the view (set = private, as on SEV). Each view has a backing of its
own. The live view of a page is an ordinary memslot; touching the other one makes KVM leave the guest, which is
what a conversion starts from. So any KVM host raises real implicit conversions, without confidential hardware.

Races, in short (docs/design.md has the long form): swapping a piece takes its slots away one after the other, and
meanwhile other vCPUs see a hole there and leave with MMIO exits, which the conversion service answers like any
other request. Cutting a piece takes all vCPUs out of KVM_RUN, since memory that is not being converted would
disappear under them.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from typing import Generic, Protocol, TypeVar

from kvmd.conversion.changes import Failure, FailureKind
from kvmd.conversion.messages import MmioAccess
from kvmd.errors import BackendError, HostError, SlotsExhausted
from kvmd.hv.exits import MemoryFault
from kvmd.memory import libc
from kvmd.memory.backing import Backing
from kvmd.protection.base import Applied
from kvmd.protection.pieces import Piece, PieceMap
from kvmd.ranges import GpaRange, PageState
from kvmd.units import MIB

BLOCK_BYTES = 2 * MIB
"""The size that memory is cut into at first. Larger blocks make the first conversion in each dearer, smaller ones
make the start of a machine dearer (bench/blocks.py has the measurement)."""

MOST_BLOCKS = 4096
"""Blocks grow with memory so that there are never more: most memslots stay free for cuts."""

MERGE_GOAL = 512
"""Memslots that merging tries to win back at a time: fewer would merge for every conversion."""


class Tripwire(enum.Enum):
    """What stands in the view that is not live."""

    GUEST_MEMFD = "guest_memfd"
    """A slot bound to a guest_memfd that was closed: any access is a memory fault."""
    HOLE = "hole"
    """No slot: a data access is an MMIO exit, which kvmd completes; instructions cannot be fetched."""


class ClosableFd(Protocol):
    """A guest_memfd, as far as a tripwire needs it."""

    def close(self) -> None:
        """Close it."""


F = TypeVar("F", bound=ClosableFd)


class SlotVm(Protocol[F]):
    """What this protection asks of a VM."""

    def set_memory_region(
        self,
        slot: int,
        gpa: int,
        size_bytes: int,
        userspace_addr: int,
        flags: int = 0,
        guest_memfd: F | None = None,
        guest_memfd_offset: int = 0,
    ) -> None:
        """Create a memslot. Raises BackendError."""

    def delete_memory_region(self, slot: int) -> None:
        """Delete a memslot. Raises BackendError."""

    def create_guest_memfd(self, size_bytes: int, flags: int = 0) -> F:
        """Create a guest_memfd. Raises BackendError."""


_GUEST_MEMFD_MMAP_INIT_SHARED = 3


class EmulatedProtection(Generic[F]):
    """The two views of one machine's memory.

    Args:
        vm: where the memslots go.
        backings: host memory of each view, of the machine's whole size.
        pinned: memory that is private for good, from 0: page tables, image, stacks, boot information.
        c_bit: the position of the C-bit.
        tripwire: the kind in use.
        slot_count: memslots that the VM has.
        quiesce: a context in which no vCPU is inside KVM_RUN.

    Raises:
        HostError: the memory needs more memslots than there are, or KVM refused one.
    """

    def __init__(
        self,
        vm: SlotVm[F],
        backings: dict[PageState, Backing],
        *,
        pinned: GpaRange,
        c_bit: int,
        tripwire: Tripwire,
        slot_count: int,
        quiesce: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._vm = vm
        self._backings = backings
        self._size = backings[PageState.PRIVATE].size_bytes
        self._mask = 1 << c_bit
        self._tripwire = tripwire
        self._quiesce = quiesce
        self._free = list(range(slot_count - 1, -1, -1))
        self._merge_from = 0
        self.cuts = 0
        self.merges = 0
        block = BLOCK_BYTES
        while block * MOST_BLOCKS < self._size:
            block *= 2
        convertible = GpaRange(pinned.end, self._size) if pinned.end < self._size else None
        self.pieces = PieceMap(convertible, block_bytes=block, fine_bytes=BLOCK_BYTES, live=PageState.PRIVATE)
        # One inaccessible stretch serves all tripwires: nothing ever looks behind it.
        self._inaccessible_bytes = max(block, pinned.size_bytes)
        try:
            self._inaccessible = libc.map_inaccessible(self._inaccessible_bytes)
        except OSError as error:
            raise HostError(f"cannot reserve addresses for tripwires: {error}") from error
        try:
            self._create(Piece(pinned.start, pinned.end, PageState.PRIVATE))
            for piece in self.pieces:
                self._create(piece)
        except BackendError as error:
            self.close()
            raise HostError(
                f"cannot set up {len(self.pieces)} blocks of guest memory: {error}: ask for less memory"
            ) from error

    @property
    def free_slots(self) -> int:
        """Memslots that are not in use."""
        return len(self._free)

    def facts(self) -> dict[str, object]:
        """Return what the machine's first log line says of it."""
        return {
            "protection": "emulated",
            "tripwire": self._tripwire.value,
            "c_bit": self._mask.bit_length() - 1,
            "block_bytes": self.pieces.block_bytes,
            "memslots_free": len(self._free),
        }

    def locate(self, gpa: int) -> tuple[int, PageState | None]:
        """Split a reported gpa into the plain one and its view, which is None outside memory."""
        plain = gpa & ~self._mask
        if plain >= self._size:
            return plain, None
        return plain, PageState.PRIVATE if gpa & self._mask else PageState.SHARED

    def wanted(self, fault: MemoryFault) -> tuple[int, PageState]:
        """Return the plain gpa and the state it needs: here the C-bit says so, the exit's flags do not."""
        return (
            fault.gpa & ~self._mask,
            PageState.PRIVATE if fault.gpa & self._mask else PageState.SHARED,
        )

    def apply(self, range_: GpaRange, to: PageState) -> Applied:
        """Make the view ``to`` of all pages of the range live, in order of address."""
        done = range_.start
        try:
            while done < range_.end:
                # Looked up each time: a cut may have merged any pieces, to win memslots.
                piece = self.pieces.at(done)
                end = min(piece.end, range_.end)
                if piece.live is not to:
                    if piece.start == done and piece.end == end:
                        self._swap(piece, to)
                    else:
                        self._cut(GpaRange(done, end), to)
                done = end
        except BackendError as error:
            kind = FailureKind.SLOTS if isinstance(error, SlotsExhausted) else FailureKind.REFUSED
            return Applied(self._live_until(done, range_.end, to), Failure(kind, str(error)))
        return Applied(range_.end)

    def discard(self, range_: GpaRange, side: PageState) -> None:
        """Give the memory behind one side of the range back to the host. Raises BackendError."""
        self._backings[side].discard(range_)

    def access(self, state: PageState, access: MmioAccess) -> bytes:
        """Make a guest's own access on the live side."""
        backing = self._backings[state]
        if access.data is None:
            return backing.read(access.gpa, access.size)
        backing.write(access.gpa, access.data)
        return b""

    def close(self) -> None:
        """Give up the tripwires' addresses, after the VM is gone; harmless the second time."""
        if self._inaccessible_bytes:
            libc.unmap(self._inaccessible, self._inaccessible_bytes)
            self._inaccessible_bytes = 0

    # -- pieces --------------------------------------------------------------------------------------------

    def _live_until(self, gpa: int, end: int, view: PageState) -> int:
        """Return where the pages from ``gpa`` that are live in ``view`` end, at most ``end``."""
        while gpa < end and (piece := self.pieces.at(gpa)).live is view:
            gpa = min(piece.end, end)
        return gpa

    def _swap(self, piece: Piece, to: PageState) -> None:
        """Make the other view of the piece live: dead first, so that never both are."""
        try:
            self._delete(piece, piece.live)
            self._trip(piece, piece.live)
            self._delete(piece, to)
            self._back(piece, to)
        except BackendError:
            self._restore(piece)
            raise
        piece.live = to

    def _cut(self, keep: GpaRange, to: PageState) -> None:
        """Make ``keep``, which lies in one piece, a piece of its own that is live in ``to``."""
        per_piece = 2 if self._tripwire is Tripwire.GUEST_MEMFD else 1
        parts = self.pieces.cut(self.pieces.at(keep.start), keep, to)
        if len(self._free) < (len(parts) - 1) * per_piece:
            self._merge()
            # Merging may have joined the piece with others.
            parts = self.pieces.cut(self.pieces.at(keep.start), keep, to)
            if len(self._free) < (len(parts) - 1) * per_piece:
                raise SlotsExhausted(
                    f"no memslot is left to cut {len(self.pieces)} pieces of memory further, and none can be merged"
                )
        with self._quiesce():
            self._exchange([self.pieces.at(keep.start)], parts)
        self.cuts += 1

    def _merge(self) -> None:
        """Merge neighbours that are live in the same view, block by block, until some memslots are won."""
        goal = len(self._free) + MERGE_GOAL
        with self._quiesce():
            while len(self._free) < goal:
                runs, self._merge_from = self.pieces.mergeable(self._merge_from)
                if not runs:
                    return
                for run in runs:
                    self._exchange(run, [Piece(run[0].start, run[-1].end, run[0].live)])
                    self.merges += 1

    def _exchange(self, old: list[Piece], new: list[Piece]) -> None:
        """Replace the slots of ``old`` by those of ``new``.

        After a failure all is as it was; or where KVM does not even take back what was just created, the pieces are
        the new ones, each live where KVM has it.
        """
        live = old[0].live
        try:
            for piece in old:
                self._delete_both(piece)
            for piece in new:
                self._create(piece)
        except BackendError:
            for piece in new:
                with suppress(BackendError):
                    self._delete_both(piece)
            if any(number is not None for piece in new for number in piece.slots.values()):
                # The old pieces cannot come back: their slots would overlap what is left, or live beside it.
                self.pieces.replace(old, new)
                for piece in new:
                    piece.live = piece.backed or live
                    self._restore(piece)
            else:
                for piece in old:
                    self._restore(piece)
            raise
        self.pieces.replace(old, new)

    def _restore(self, piece: Piece) -> None:
        """After a failure, bring the piece's slots to what ``piece.live`` says, as far as KVM lets us.

        Where it does not, a view is a hole. In the dead view that is a tripwire too; memory that the guest then misses
        in the live one is an MMIO exit that the service completes: slower, never wrong.
        """
        dead = piece.live.opposite
        if piece.backed is not piece.live and piece.slots[piece.live] is not None:
            with suppress(BackendError):
                self._delete(piece, piece.live)
        if piece.slots[piece.live] is None and piece.backed is None:
            with suppress(BackendError):
                self._back(piece, piece.live)
        if piece.slots[dead] is None:
            with suppress(BackendError):
                self._trip(piece, dead)

    def _delete_both(self, piece: Piece) -> None:
        for view in PageState:
            self._delete(piece, view)

    def _create(self, piece: Piece) -> None:
        self._back(piece, piece.live)
        self._trip(piece, piece.live.opposite)

    def _gpa(self, piece: Piece, view: PageState) -> int:
        return piece.start | self._mask if view is PageState.PRIVATE else piece.start

    def _delete(self, piece: Piece, view: PageState) -> None:
        slot = piece.slots[view]
        if slot is not None:
            self._vm.delete_memory_region(slot)
            piece.slots[view] = None
            if piece.backed is view:
                piece.backed = None
            self._free.append(slot)

    def _take_slot(self) -> int:
        if not self._free:
            raise SlotsExhausted("no memslot is left")
        return self._free.pop()

    def _back(self, piece: Piece, view: PageState) -> None:
        """Put the view's backing behind the piece: it is live."""
        slot = self._take_slot()
        address = self._backings[view].address_of(piece.start)
        try:
            self._vm.set_memory_region(slot, self._gpa(piece, view), piece.size_bytes, address)
        except BackendError:
            self._free.append(slot)
            raise
        piece.slots[view] = slot
        piece.backed = view

    def _trip(self, piece: Piece, view: PageState) -> None:
        """Put a tripwire in the view of the piece."""
        if self._tripwire is Tripwire.HOLE:
            return
        slot = self._take_slot()
        try:
            memfd = self._vm.create_guest_memfd(piece.size_bytes, _GUEST_MEMFD_MMAP_INIT_SHARED)
            try:
                self._vm.set_memory_region(
                    slot,
                    self._gpa(piece, view),
                    piece.size_bytes,
                    self._inaccessible,
                    guest_memfd=memfd,
                )
            finally:
                # Closing the last fd is what makes the slot a tripwire: KVM keeps no reference of its own.
                memfd.close()
        except BackendError:
            self._free.append(slot)
            raise
        piece.slots[view] = slot
