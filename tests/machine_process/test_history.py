from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmd.machine_process.history import ByteHistory, Piece


def test_bytes_are_found_by_their_place() -> None:
    history = ByteHistory(8)
    history.append(b"0123")
    assert history.read(0, 100) == Piece(0, 0, b"0123")
    assert history.read(2, 1) == Piece(0, 2, b"2")
    assert history.read(4, 100) == Piece(0, 4, b"")
    assert history.read(99, 100).data == b""
    history.append(b"456789AB")
    assert (history.start, history.end) == (4, 12)
    assert history.read(1, 2) == Piece(3, 4, b"45")


def test_a_history_needs_room() -> None:
    with pytest.raises(ValueError, match="at least one byte"):
        ByteHistory(0)


@given(st.lists(st.binary(max_size=12)), st.integers(1, 16), st.integers(1, 8), st.integers(0, 5))
def test_what_is_read_and_what_is_dropped_is_all_there_was(
    parts: list[bytes], capacity: int, limit: int, skipped: int
) -> None:
    history = ByteHistory(capacity)
    whole = b"".join(parts)
    at = 0
    for number, part in enumerate(parts):
        history.append(part)
        if number % (skipped + 1) == 0:
            piece = history.read(at, limit)
            assert piece.start == at + piece.dropped
            assert piece.data == whole[piece.start : piece.end]
            at = piece.end
    assert history.end == len(whole)
