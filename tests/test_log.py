import datetime as dt
import io
import json
from collections.abc import Iterator

import msgspec
import pytest
import structlog

from kvmd import log
from kvmd.conversion.messages import Cause, Outcome
from kvmd.conversion.record import ConversionRecord
from kvmd.ranges import PageState
from tests.conversion import records

RECORD = msgspec.structs.replace(
    records.RECORD,
    sequence=7,
    wall_ns=1_700_000_000_123_456_789,
    monotonic_ns=42_000_000_001,
    vcpu=3,
    cause=Cause.EXPLICIT,
    gpa=0x20_0000,
    size_bytes=8192,
    merged=2,
    waiting_ns=10000,
    applying_ns=200500,
    discarding_ns=0,
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def structlog_as_it_was() -> Iterator[None]:
    yield
    structlog.reset_defaults()


def test_json_is_one_object_a_line_with_time_level_and_event_first() -> None:
    stream = io.StringIO()
    log.configure(log_format="json", stream=stream)
    structlog.get_logger().warning("odd", number=1, text="a\nb")
    line = stream.getvalue()
    assert line.count("\n") == 1
    event = json.loads(line)
    assert list(event) == ["timestamp", "level", "event", "number", "text"]
    assert (event["level"], event["event"], event["text"]) == ("warning", "odd", "a\nb")
    when = dt.datetime.fromisoformat(event["timestamp"])
    assert when.utcoffset() == dt.timedelta(0)


def test_json_holds_what_is_no_json_as_text() -> None:
    stream = io.StringIO()
    log.configure(log_format="json", stream=stream)
    structlog.get_logger().info("odd", state=PageState.SHARED, path="a\udcff", big=1 << 80, thing=object)
    event = json.loads(stream.getvalue())
    assert event["path"] == "a\udcff"
    assert event["big"] == 1 << 80
    assert event["event"] == "odd"


def test_json_holds_an_exception_as_text() -> None:
    stream = io.StringIO()
    log.configure(log_format="json", stream=stream)
    try:
        int("broken")
    except ValueError:
        structlog.get_logger().exception("failed")
    assert "ValueError: invalid literal" in json.loads(stream.getvalue())["exception"]


@pytest.mark.parametrize(("level", "shown"), [("debug", 3), ("info", 2), ("error", 0)])
def test_only_events_from_the_level_up_are_shown(level: log.LogLevel, shown: int) -> None:
    stream = io.StringIO()
    log.configure(log_format="json", stream=stream, level=level)
    logger = structlog.get_logger()
    logger.debug("a")
    logger.info("b")
    logger.warning("c")
    assert stream.getvalue().count("\n") == shown


def test_the_console_is_coloured_only_on_a_terminal() -> None:
    for stream, coloured in ((io.StringIO(), False), (Terminal(), True)):
        log.configure(log_format="console", stream=stream)
        structlog.get_logger().info("hello", number=1)
        assert ("\x1b[" in stream.getvalue()) is coloured
        assert "hello" in stream.getvalue()


def test_a_conversion_is_a_flat_event() -> None:
    event = log.conversion_event(RECORD, "web-1")
    assert event == {
        "sequence": 7,
        "time": "2023-11-14T22:13:20.123456Z",
        "monotonic_ns": 42_000_000_001,
        "machine": "web-1",
        "vcpu": 3,
        "cause": "explicit",
        "gpa": "0x200000",
        "size": 8192,
        "from": "private",
        "to": "shared",
        "outcome": "converted",
        "merged": 2,
        "waiting_us": 10.0,
        "applying_us": 200.5,
        "discarding_us": 0.0,
    }


def test_a_conversion_of_mixed_memory_came_from_nothing_in_particular() -> None:
    mixed = ConversionRecord(1, 0, 0, 0, Cause.EXPLICIT, 0, 8192, None, PageState.SHARED, Outcome.REFUSED, 0, 1, 0, 0)
    assert log.conversion_event(mixed, "m")["from"] is None
    stream = io.StringIO()
    log.configure(log_format="console", stream=stream)
    structlog.get_logger().info("conversion", **log.conversion_event(mixed, "m"))
    assert "mixed -> shared refused" in stream.getvalue()


def test_on_the_console_a_conversion_is_one_short_line() -> None:
    stream = io.StringIO()
    log.configure(log_format="console", stream=stream)
    structlog.get_logger().info("conversion", **log.conversion_event(RECORD, "web-1"))
    expected = "conversion 7: vcpu 3 explicit 0x200000 8 KiB private -> shared converted us=10+200+0"
    assert stream.getvalue().rstrip().endswith(expected)
