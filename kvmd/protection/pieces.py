"""How convertible memory is cut into memslots: a partition of it, without any I/O.

A piece is one run of pages with the same live view, and one memslot in each view (or none, where a hole is the
tripwire). Pieces start as blocks of bounded size, are cut where a conversion needs an edge, and are merged again
only when memslots run out.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from itertools import pairwise

from kvmd.ranges import GpaRange, PageState


class Piece:
    """One run of pages ``[start, end)``: which view is live, and the memslots of both.

    Attributes:
        start: the first page's address in bytes.
        end: one past the last page.
        live: the view that is live, or is to be once a failure is mended.
        backed: the view that has a memslot on its backing now, or None: never both have.
        slots: the memslot of each view, or None for a hole.
    """

    __slots__ = ("backed", "end", "live", "slots", "start")

    def __init__(self, start: int, end: int, live: PageState) -> None:
        self.start = start
        self.end = end
        self.live = live
        self.backed: PageState | None = None
        self.slots: dict[PageState, int | None] = {PageState.PRIVATE: None, PageState.SHARED: None}

    @property
    def size_bytes(self) -> int:
        """Length in bytes."""
        return self.end - self.start

    def __repr__(self) -> str:
        return f"Piece([{self.start:#x}, {self.end:#x}) {self.live.value} {self.slots})"


class PieceMap:
    """The pieces of ``range_``, in order and without gaps.

    Args:
        range_: all convertible memory, or None where all of it is pinned.
        block_bytes: the size of a block in bytes, a power of two; no piece crosses a block's edge.
        fine_bytes: a piece larger than this is cut to it first, so that the next cut nearby is cheap.
        live: the view that is live at first.
    """

    def __init__(self, range_: GpaRange | None, *, block_bytes: int, fine_bytes: int, live: PageState) -> None:
        self.block_bytes = block_bytes
        self.fine_bytes = min(fine_bytes, block_bytes)
        self._starts: list[int] = []
        self._pieces: list[Piece] = []
        if range_ is None:
            return
        edges = [range_.start, *range(_above(range_.start, block_bytes), range_.end, block_bytes), range_.end]
        self._starts = edges[:-1]
        self._pieces = [Piece(start, end, live) for start, end in pairwise(edges)]

    def __len__(self) -> int:
        return len(self._pieces)

    def __iter__(self) -> Iterator[Piece]:
        return iter(self._pieces)

    def at(self, gpa: int) -> Piece:
        """Return the piece that holds ``gpa``, which is in the range."""
        return self._pieces[bisect_right(self._starts, gpa) - 1]

    def cut(self, piece: Piece, keep: GpaRange, to: PageState) -> list[Piece]:
        """Return the pieces, without memslots, that ``piece`` falls into so that ``keep`` is one of them.

        The one for ``keep`` is live in ``to``, the others as ``piece`` was. Changes nothing: see ``replace``.
        """
        edges = {piece.start, piece.end, keep.start, keep.end}
        if piece.size_bytes > self.fine_bytes:
            edges.add(max(piece.start, keep.start // self.fine_bytes * self.fine_bytes))
            edges.add(min(piece.end, _above(keep.end - 1, self.fine_bytes)))
        ordered = sorted(edges)
        return [
            Piece(start, end, to if keep.start <= start < keep.end else piece.live) for start, end in pairwise(ordered)
        ]

    def replace(self, old: list[Piece], new: list[Piece]) -> None:
        """Put ``new`` in the place of ``old``: neighbours that cover the same pages."""
        first = bisect_left(self._starts, old[0].start)
        self._pieces[first : first + len(old)] = new
        self._starts[first : first + len(old)] = [piece.start for piece in new]

    def mergeable(self, start: int) -> tuple[list[list[Piece]], int]:
        """Return runs of pieces that could be one, in the first block at or after ``start`` that has any.

        Also returns where to look next time, wrapping around at the end; no runs mean there are none at all.
        """
        first = bisect_left(self._starts, start)
        order = [*range(first, len(self._starts)), *range(min(first, len(self._starts)))]
        runs: list[list[Piece]] = []
        run: list[Piece] = []
        for index in order:
            piece = self._pieces[index]
            if run and run[-1].end == piece.start and self._joins(run[-1], piece):
                run.append(piece)
                continue
            if len(run) > 1:
                runs.append(run)
            if runs and piece.start // self.block_bytes != runs[0][0].start // self.block_bytes:
                return runs, piece.start
            run = [piece]
        if len(run) > 1:
            runs.append(run)
        return runs, 0

    def _joins(self, left: Piece, right: Piece) -> bool:
        return left.live is right.live and left.start // self.block_bytes == right.start // self.block_bytes


def _above(gpa: int, alignment: int) -> int:
    """Return the first multiple of ``alignment`` above ``gpa``."""
    return (gpa // alignment + 1) * alignment
