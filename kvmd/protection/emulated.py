"""Emulated protection by memslots: two views of guest memory, one of them live, the other a tripwire.

The live view of a page is an ordinary memslot; touching the other one makes KVM leave the guest, which is what a
conversion starts from. So any KVM host raises real implicit conversions, without confidential hardware.
``kvmd.protection.attribute_views`` does the same with less effort where KVM has memory attributes.

Races, in short (docs/design.md has the long form): swapping a piece takes its slots away one after the other, and
meanwhile other vCPUs see a hole there and leave with MMIO exits, which the conversion service answers like any
other request. Cutting a piece takes all vCPUs out of KVM_RUN, since memory that is not being converted would
disappear under them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from typing import Generic

from kvmd.conversion.changes import Failure, FailureKind
from kvmd.errors import BackendError, HostError, SlotsExhausted, SwapFailed
from kvmd.memory import libc
from kvmd.memory.backing import Backing
from kvmd.protection.base import Applied
from kvmd.protection.pieces import Piece, PieceMap
from kvmd.protection.two_views import Tripwire, TwoViews
from kvmd.protection.vm import F, SlotVm
from kvmd.ranges import PRIVATE, GpaRange, PageState
from kvmd.units import MIB, PAGE_SIZE

BLOCK_BYTES = 2 * MIB
"""The size that memory is cut into at first. Larger blocks make the first conversion in each dearer, smaller ones
make the start of a machine dearer (``kvmd bench blocks`` has the measurement)."""

MOST_BLOCKS = 4096
"""Blocks grow with memory so that there are never more: most memslots stay free for cuts."""

MERGE_GOAL = 512
"""Memslots that merging tries to win back at a time: fewer would merge for every conversion."""


_GUEST_MEMFD_MMAP_INIT_SHARED = 3


class EmulatedProtection(TwoViews, Generic[F]):
    """The two views of one machine's memory.

    Args:
        vm: where the memslots go.
        backings: host memory of each view, of the machine's whole size.
        pinned: memory that is private for good, from 0: page tables, image, stacks, boot information.
        c_bit: the position of the C-bit.
        tripwire: the kind in use, of those that need no attributes.
        slot_count: memslots that the VM has.
        quiesce: a context in which no vCPU is inside KVM_RUN.
        initial: the view of convertible memory that is live at first.

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
        initial: PageState = PageState.PRIVATE,
    ) -> None:
        super().__init__(backings, c_bit=c_bit)
        self._vm = vm
        self._tripwire = tripwire
        self._keeps_reserve = tripwire is Tripwire.GUEST_MEMFD
        self._quiesce = quiesce
        self._reserve: F | None = None
        self._free = list(range(slot_count - 1, -1, -1))
        self._merge_from = 0
        self.cuts = 0
        self.merges = 0
        block = BLOCK_BYTES
        while block * MOST_BLOCKS < self._size:
            block *= 2
        convertible = GpaRange(pinned.end, self._size) if pinned.end < self._size else None
        self.pieces = PieceMap(convertible, block_bytes=block, fine_bytes=BLOCK_BYTES, live=initial)
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

    def apply(self, range_: GpaRange, to: PageState) -> Applied:
        """Make the view ``to`` of all pages of the range live, in order of address."""
        done, last = range_.start, range_.end
        try:
            while True:
                # Looked up each time: a cut may have merged any pieces, to win memslots.
                piece = self.pieces.at(done)
                end = piece.end if piece.end < last else last  # noqa: FURB136 - min() is a call, for each conversion
                if piece.live is not to:
                    if piece.start == done and piece.end == end:
                        self._swap(piece, to)
                    else:
                        self._cut(GpaRange(done, end), to)
                if end == last:
                    return Applied(last)
                done = end
        except BackendError as error:
            kind = FailureKind.SLOTS if isinstance(error, SlotsExhausted) else FailureKind.REFUSED
            return Applied(self._live_until(done, last, to), Failure(kind, str(error)))

    def discard(self, range_: GpaRange, side: PageState) -> None:
        """Give the memory behind one side of the range back to the host. Raises BackendError.

        The guest runs again by now, so this is also the moment to make what the next conversion of a page will need:
        a guest_memfd, which costs it ten microseconds otherwise.
        """
        self._backings[side].discard(range_)
        if self._reserve is None and self._keeps_reserve and range_.end - range_.start == PAGE_SIZE:
            try:  # noqa: SIM105 - with suppress() costs as much as making it
                self._reserve = self._vm.create_guest_memfd(PAGE_SIZE, _GUEST_MEMFD_MMAP_INIT_SHARED)
            except BackendError:
                pass  # the next tripwire tries again, and says so

    def diagnose(self, range_: GpaRange, state: PageState) -> str:
        """Return what may keep an access to live memory from succeeding."""
        if any(
            piece.start < range_.end and range_.start < piece.end and piece.backed is not state for piece in self.pieces
        ):
            return "KVM refused a memslot for it earlier"
        return ""

    def close(self) -> None:
        """Give up the tripwires' addresses and what is in reserve; harmless the second time."""
        if self._reserve is not None:
            self._reserve.close()
            self._reserve = None
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
        old = piece.live
        dying, rising = piece.slots[old], piece.slots[to]
        if dying is None or rising is None:
            self._swap_with_holes(piece, to)
            return
        # The usual case, and most of what kvmd itself adds to a conversion: each memslot keeps its number.
        start, size_bytes = piece.start, piece.end - piece.start
        # What view_gpa returns, without two calls.
        private = start | self._mask
        dying_gpa, rising_gpa = (start, private) if to is PRIVATE else (private, start)
        try:
            self._vm.swap_views(
                dying,
                dying_gpa,
                self._inaccessible,
                self._take_memfd(size_bytes),
                rising,
                rising_gpa,
                self._backings[to].address + start,
                size_bytes,
            )
        except SwapFailed as error:
            if error.made >= 1:
                piece.backed = None
                if error.made == 1:
                    self._give_up(piece, old, dying)
                elif error.made == 3:  # noqa: PLR2004 - see SlotVm.swap_views
                    self._give_up(piece, to, rising)
            self._restore(piece)
            raise
        piece.live = piece.backed = to

    def _swap_with_holes(self, piece: Piece, to: PageState) -> None:
        """The same where a view is a hole: by the kind of tripwire, or since KVM had refused a memslot."""
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

    def _give_up(self, piece: Piece, view: PageState, slot: int) -> None:
        """Note that the view has no memslot any more."""
        piece.slots[view] = None
        self._free.append(slot)

    def _take_memfd(self, size_bytes: int) -> F:
        """Return an open guest_memfd for a tripwire."""
        if size_bytes == PAGE_SIZE and self._reserve is not None:
            memfd, self._reserve = self._reserve, None
            return memfd
        return self._vm.create_guest_memfd(size_bytes, _GUEST_MEMFD_MMAP_INIT_SHARED)

    def _delete_both(self, piece: Piece) -> None:
        for view in PageState:
            self._delete(piece, view)

    def _create(self, piece: Piece) -> None:
        self._back(piece, piece.live)
        self._trip(piece, piece.live.opposite)

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
            self._vm.set_memory_region(slot, self.view_gpa(piece.start, view), piece.size_bytes, address)
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
            memfd = self._take_memfd(piece.size_bytes)
            try:
                self._vm.set_memory_region(
                    slot,
                    self.view_gpa(piece.start, view),
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
