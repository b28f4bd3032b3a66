from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from kvmd.protection.pieces import Piece, PieceMap
from kvmd.ranges import GpaRange, PageState
from kvmd.units import PAGE_SIZE

BLOCK, FINE = 16, 4
"""Pages; blocks this small make every edge near."""


def pages(start: int, end: int) -> GpaRange:
    return GpaRange(start * PAGE_SIZE, end * PAGE_SIZE)


def map_of(start: int, end: int, *, block: int = BLOCK, fine: int = FINE) -> PieceMap:
    return PieceMap(
        pages(start, end), block_bytes=block * PAGE_SIZE, fine_bytes=fine * PAGE_SIZE, live=PageState.PRIVATE
    )


def in_pages(pieces: list[Piece]) -> list[tuple[int, int]]:
    return [(piece.start // PAGE_SIZE, piece.end // PAGE_SIZE) for piece in pieces]


def check(pieces: PieceMap, whole: GpaRange, live: dict[int, PageState]) -> None:
    """Assert a partition of ``whole`` into pieces that no block's edge cuts, each live as ``live`` has its pages."""
    found = list(pieces)
    assert len(pieces) == len(found)
    assert found[0].start == whole.start
    assert found[-1].end == whole.end
    assert all(left.end == right.start for left, right in pairwise(found))
    for piece in found:
        assert piece.start < piece.end
        assert piece.size_bytes == piece.end - piece.start
        assert piece.start // pieces.block_bytes == (piece.end - 1) // pieces.block_bytes
        for gpa in range(piece.start, piece.end, PAGE_SIZE):
            assert live[gpa] is piece.live
            assert pieces.at(gpa) is piece
            assert pieces.at(gpa + PAGE_SIZE - 1) is piece


def convert(pieces: PieceMap, range_: GpaRange, to: PageState) -> int:
    """Convert as EmulatedProtection does; return how many pieces were cut."""
    cuts = 0
    for piece in list(pieces):
        if piece.live is to or piece.end <= range_.start or range_.end <= piece.start:
            continue
        keep = GpaRange(max(piece.start, range_.start), min(piece.end, range_.end))
        if keep.size_bytes == piece.size_bytes:
            piece.live = to
            continue
        parts = pieces.cut(piece, keep, to)
        assert [part.live is to for part in parts] == [
            (part.start, part.end) == (keep.start, keep.end) for part in parts
        ]
        assert all(number is None for part in parts for number in part.slots.values())
        pieces.replace([piece], parts)
        cuts += 1
    return cuts


@st.composite
def machines(draw: st.DrawFn) -> tuple[PieceMap, GpaRange]:
    start = draw(st.integers(0, 40))
    end = draw(st.integers(start + 1, start + 80))
    fine = draw(st.sampled_from([1, 4, 16, 32]))
    return map_of(start, end, fine=fine), pages(start, end)


@settings(max_examples=150, deadline=None)
@given(machine=machines(), data=st.data())
def test_cuts_and_merges_keep_a_partition_within_blocks(
    machine: tuple[PieceMap, GpaRange], data: st.DataObject
) -> None:
    pieces, whole = machine
    live = dict.fromkeys(range(whole.start, whole.end, PAGE_SIZE), PageState.PRIVATE)
    check(pieces, whole, live)
    merge_from = 0
    first, past = whole.start // PAGE_SIZE, whole.end // PAGE_SIZE
    for _ in range(data.draw(st.integers(1, 12))):
        if data.draw(st.booleans()):
            start = data.draw(st.integers(first, past - 1))
            range_ = pages(start, data.draw(st.integers(start + 1, past)))
            to = data.draw(st.sampled_from(PageState))
            convert(pieces, range_, to)
            live.update(dict.fromkeys(range(range_.start, range_.end, PAGE_SIZE), to))
        else:
            runs, merge_from = pieces.mergeable(merge_from)
            for run in runs:
                assert len(run) > 1
                pieces.replace(run, [Piece(run[0].start, run[-1].end, run[0].live)])
        check(pieces, whole, live)


@settings(max_examples=100, deadline=None)
@given(machine=machines(), data=st.data())
def test_merging_ends_when_nothing_can_be_merged_any_more(
    machine: tuple[PieceMap, GpaRange], data: st.DataObject
) -> None:
    pieces, whole = machine
    first, past = whole.start // PAGE_SIZE, whole.end // PAGE_SIZE
    for _ in range(data.draw(st.integers(0, 12))):
        start = data.draw(st.integers(first, past - 1))
        convert(pieces, pages(start, data.draw(st.integers(start + 1, past))), data.draw(st.sampled_from(PageState)))
    expected: list[tuple[int, int]] = []
    lives: list[PageState] = []
    for piece in pieces:
        same_block = bool(expected) and expected[-1][0] // pieces.block_bytes == piece.start // pieces.block_bytes
        if same_block and lives[-1] is piece.live:
            expected[-1] = (expected[-1][0], piece.end)
        else:
            expected.append((piece.start, piece.end))
            lives.append(piece.live)

    merge_from = 0
    before = len(pieces)
    while True:
        runs, merge_from = pieces.mergeable(merge_from)
        if not runs:
            break
        blocks = {piece.start // pieces.block_bytes for run in runs for piece in run}
        assert len(blocks) == 1
        for run in runs:
            pieces.replace(run, [Piece(run[0].start, run[-1].end, run[0].live)])
        assert len(pieces) < before
        before = len(pieces)

    assert [(piece.start, piece.end) for piece in pieces] == expected


def test_blocks_are_aligned_whatever_the_start() -> None:
    assert in_pages(list(map_of(5, 50))) == [(5, 16), (16, 32), (32, 48), (48, 50)]
    assert in_pages(list(map_of(16, 32))) == [(16, 32)]


def test_no_convertible_memory_is_no_piece() -> None:
    pieces = PieceMap(None, block_bytes=1 << 21, fine_bytes=1 << 21, live=PageState.PRIVATE)
    assert list(pieces) == []
    assert pieces.mergeable(0) == ([], 0)


def test_a_large_block_is_cut_to_fine_pieces_around_the_page() -> None:
    pieces = map_of(0, 64, block=64, fine=4)
    assert in_pages(pieces.cut(pieces.at(0), pages(9, 10), PageState.SHARED)) == [
        (0, 8),
        (8, 9),
        (9, 10),
        (10, 12),
        (12, 64),
    ]


def test_a_page_at_a_fine_edge_needs_no_cut_beyond_it() -> None:
    pieces = map_of(0, 64, block=64, fine=4)
    last, first = pages(11, 12), pages(8, 9)
    assert in_pages(pieces.cut(pieces.at(0), last, PageState.SHARED)) == [(0, 8), (8, 11), (11, 12), (12, 64)]
    assert in_pages(pieces.cut(pieces.at(0), first, PageState.SHARED)) == [(0, 8), (8, 9), (9, 12), (12, 64)]


def test_a_fine_piece_is_cut_just_at_the_page() -> None:
    pieces = map_of(0, 4)
    assert in_pages(pieces.cut(pieces.at(0), pages(1, 2), PageState.SHARED)) == [(0, 1), (1, 2), (2, 4)]
    assert in_pages(pieces.cut(pieces.at(0), pages(0, 2), PageState.SHARED)) == [(0, 2), (2, 4)]


def test_a_second_cut_nearby_leaves_the_large_remains_alone() -> None:
    pieces = map_of(0, 64, block=64, fine=4)
    convert(pieces, pages(9, 10), PageState.SHARED)
    large = [piece for piece in pieces if piece.size_bytes > 4 * PAGE_SIZE]
    convert(pieces, pages(10, 11), PageState.SHARED)
    assert [piece for piece in pieces if piece.size_bytes > 4 * PAGE_SIZE] == large


def test_cutting_changes_nothing_by_itself() -> None:
    pieces = map_of(0, 16)
    pieces.cut(pieces.at(0), pages(1, 2), PageState.SHARED)
    assert in_pages(list(pieces)) == [(0, 16)]


def test_merging_goes_on_where_it_left_off() -> None:
    pieces = map_of(0, 3 * BLOCK)
    for page in (1, BLOCK + 1, 2 * BLOCK + 1):
        convert(pieces, pages(page, page + 1), PageState.SHARED)
        convert(pieces, pages(page, page + 1), PageState.PRIVATE)
    first, then = pieces.mergeable(BLOCK * PAGE_SIZE)
    assert {piece.start // (BLOCK * PAGE_SIZE) for run in first for piece in run} == {1}
    second, _ = pieces.mergeable(then)
    assert {piece.start // (BLOCK * PAGE_SIZE) for run in second for piece in run} == {2}
    around, _ = pieces.mergeable(3 * BLOCK * PAGE_SIZE)
    assert {piece.start // (BLOCK * PAGE_SIZE) for run in around for piece in run} == {0}


def test_neighbours_of_another_block_or_view_are_not_merged() -> None:
    pieces = map_of(0, 2 * BLOCK)
    assert pieces.mergeable(0)[0] == []
    convert(pieces, pages(0, 4), PageState.SHARED)
    assert [piece.live for piece in pieces][:2] == [PageState.SHARED, PageState.PRIVATE]
    assert all(len({piece.live for piece in run}) == 1 for run in pieces.mergeable(0)[0])
