import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmd.picture import ASCII, BLOCKS, picture
from kvmd.ranges import GpaRange, PageState
from kvmd.units import MIB, PAGE_SIZE

P, S = PageState.PRIVATE, PageState.SHARED


def pages(first: int, end: int) -> GpaRange:
    return GpaRange(first * PAGE_SIZE, end * PAGE_SIZE)


def cells(text: str) -> list[str]:
    """Return the rows of cells, without addresses and legend."""
    return [line.split(" ", 1)[1] for line in text.splitlines()[:-1]]


def test_a_cell_for_each_page_where_there_is_room() -> None:
    memory_map = [(pages(0, 3), P), (pages(3, 5), S), (pages(5, 8), P)]
    assert picture(memory_map, pages(0, 8), pinned=pages(0, 2), palette=ASCII, columns=4) == (
        "0x0000 @@#.\n0x4000 .###\n       # private  . shared  + both  @ pinned  (1 cell = 4 KiB)"
    )


def test_larger_memory_has_larger_cells_of_a_power_of_two_of_pages() -> None:
    drawn = picture([(GpaRange(0, 64 * MIB), P)], GpaRange(0, 64 * MIB), rows=4)
    assert cells(drawn) == [BLOCKS.private * 64] * 4
    assert drawn.splitlines()[1].startswith("0x1000000 ")
    assert "(1 cell = 256 KiB)" in drawn


def test_a_cell_with_pages_of_both_states_is_mixed_even_where_some_are_pinned() -> None:
    memory_map = [(pages(0, 3), P), (pages(3, 4), S), (pages(4, 8), P)]
    assert cells(picture(memory_map, pages(0, 8), pinned=pages(0, 2), columns=2, rows=1, palette=ASCII)) == ["+#"]


def test_memory_that_nothing_covers_is_blank() -> None:
    assert cells(picture([(pages(1, 2), S)], pages(0, 3), palette=ASCII)) == [" . "]


def test_a_part_of_memory_can_be_drawn() -> None:
    memory_map = [(pages(0, 513), P), (pages(513, 514), S), (pages(514, 1024), P)]
    drawn = picture(memory_map, pages(512, 516), pinned=pages(0, 8), palette=ASCII, legend=False)
    assert drawn == "0x200000 #.##\n         (1 cell = 4 KiB)"


def test_every_line_fits_a_terminal_of_80_columns() -> None:
    size = 1 << 40
    assert max(map(len, picture([(GpaRange(0, size), P)], GpaRange(0, size)).splitlines())) <= 80


@pytest.mark.parametrize(("columns", "rows"), [(0, 1), (1, 0)])
def test_there_must_be_a_cell(columns: int, rows: int) -> None:
    with pytest.raises(ValueError, match="cannot draw"):
        picture([], pages(0, 1), columns=columns, rows=rows)


@given(
    states=st.lists(st.sampled_from([P, S, None]), min_size=1, max_size=200),
    first=st.integers(0, 50),
    columns=st.integers(1, 20),
    rows=st.integers(1, 6),
    pinned=st.integers(0, 40),
)
def test_a_picture_says_what_the_pages_say(
    states: list[PageState | None], first: int, columns: int, rows: int, pinned: int
) -> None:
    first = min(first, len(states) - 1)
    memory_map = [(pages(at, at + 1), state) for at, state in enumerate(states) if state is not None]
    within = pages(first, len(states))
    drawn = picture(
        memory_map, within, pinned=pages(0, pinned) if pinned else None, columns=columns, rows=rows, palette=ASCII
    )
    lines = cells(drawn)
    assert len(lines) <= rows
    assert all(len(line) <= columns for line in lines)
    shown = "".join(lines)
    drawn_pages = states[first:]
    per_cell = 1
    while per_cell * columns * rows < len(drawn_pages):
        per_cell *= 2
    expected = ""
    for at in range(0, len(drawn_pages), per_cell):
        found = {state for state in drawn_pages[at : at + per_cell] if state is not None}
        if len(found) == 2:
            expected += "+"
        elif found and first + at < pinned:
            expected += "@"
        else:
            expected += {P: "#", S: "."}[found.pop()] if found else " "
    assert shown == expected
