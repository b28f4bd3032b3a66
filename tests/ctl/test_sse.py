from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmd.ctl.errors import NotKvmd
from kvmd.ctl.sse import LINE_LIMIT, Event, Parser

STREAM = (
    '\ufeffretry: 1500\n\n: still here\n\nid: 1\nevent: lifecycle\ndata: {"change":"ü"}\n\n'
    'id:2\r\nevent:conversion\r\ndata:{"a":\r\ndata: 1}\r\n\r\n'
    'id: 3\revent: lost\rdata: {"lost": 5}\r\rdata: {}\n\nid: 4\n\nid: 9\nevent: lifecycle\ndata: {"half'
).encode()
EVENTS = [
    Event("1", "lifecycle", {"change": "ü"}),
    Event("2", "conversion", {"a": 1}),
    Event("3", "lost", {"lost": 5}),
    Event("3", "message", {}),
]


@given(st.lists(st.integers(0, len(STREAM)), max_size=30))
def test_events_come_out_whatever_pieces_the_bytes_come_in(cuts: list[int]) -> None:
    parser = Parser()
    edges = [0, *sorted(cuts), len(STREAM)]
    found = [event for start, end in pairwise(edges) for event in parser.feed(STREAM[start:end])]
    assert found == EVENTS
    # An id alone counts too; that of an event which never became whole does not.
    assert parser.last_id == "4"
    assert parser.retry_seconds == 1.5


def test_a_new_connection_begins_with_a_new_line() -> None:
    parser = Parser()
    assert list(parser.feed(b'id: 1\ndata: {}\n\nid: 2\ndata: {"ha')) == [Event("1", "message", {})]
    parser.restart()
    assert list(parser.feed(b"event: lost\ndata: {}\n\n")) == [Event("1", "lost", {})]


@pytest.mark.parametrize("data", [b"{", b"7", b"\xff", b"[" * 10_000])
def test_data_that_is_no_object(data: bytes) -> None:
    with pytest.raises(NotKvmd):
        list(Parser().feed(b"data: " + data + b"\n\n"))


@pytest.mark.parametrize("line", [b"data: " + b"x" * 1000 + b"\n", b": " + b"x" * 1000, b"data: " + b"x" * 1000])
def test_an_event_without_an_end_is_refused(line: bytes) -> None:
    parser = Parser()

    def feed() -> None:
        for _ in range(LINE_LIMIT // 500):
            list(parser.feed(line))

    with pytest.raises(NotKvmd, match="larger than any"):
        feed()


@given(st.binary(max_size=300))
def test_anything_is_events_or_refused(data: bytes) -> None:
    parser = Parser()
    try:
        for event in parser.feed(data):
            json.dumps(event.data)
    except NotKvmd:
        pass
