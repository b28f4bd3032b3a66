from __future__ import annotations

import io
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from kvmd import log
from kvmd.journal import Journal, entry_of, is_stderr


def fields_of(entry: bytes) -> dict[str, str]:
    """Read an entry as journald does (systemd.io/JOURNAL_NATIVE_PROTOCOL)."""
    found = {}
    while entry:
        line, _, entry = entry.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            size = int.from_bytes(entry[:8], "little")
            value, entry = entry[8 : 8 + size], entry[8 + size + 1 :]
        found[name.decode()] = value.decode()
    return found


@pytest.fixture
def journald(tmp_path: Path) -> Iterator[socket.socket]:
    """Journald's end."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "journal"))
        listening.settimeout(10)
        yield listening


@pytest.fixture(autouse=True)
def structlog_as_it_was() -> Iterator[None]:
    yield
    structlog.reset_defaults()


def test_an_event_is_a_line_to_read_and_fields_to_search() -> None:
    event = {"event": "machine-stopped", "level": "error", "timestamp": "now", "machine": "web", "vcpu": 3, "a b": None}
    assert fields_of(entry_of({**event, "Wörd-1": "two words"})) == {
        "MESSAGE": 'machine-stopped machine=web vcpu=3 Wörd-1="two words"',
        "PRIORITY": "3",
        "SYSLOG_IDENTIFIER": "kvmd",
        "KVMD_EVENT": "machine-stopped",
        "KVMD_MACHINE": "web",
        "KVMD_VCPU": "3",
        "KVMD_W_RD_1": "two words",
    }


def test_what_has_more_lines_is_no_other_field() -> None:
    fields = fields_of(
        entry_of({"event": "x", "level": "warning", "machine": "a\nPRIORITY=0", "exception": "one\ntwo"})
    )
    assert fields["KVMD_MACHINE"] == "a\nPRIORITY=0"
    assert fields["PRIORITY"] == "4"
    assert fields["MESSAGE"] == 'x machine="a\\nPRIORITY=0"\none\ntwo'


@pytest.mark.parametrize("value", [{"a": [1, None]}, object(), "\udcff", "x" * 100_000, float("nan"), ""])
def test_any_value_makes_an_entry(value: object) -> None:
    fields = fields_of(entry_of({"event": "x", "value": value}))
    assert len(fields["MESSAGE"]) <= 1 << 14
    assert "KVMD_VALUE" in fields


def test_events_go_to_the_journal_instead_of_the_stream(journald: socket.socket) -> None:
    stream = io.StringIO()
    with Journal(journald.getsockname()) as journal:
        log.configure(log_format="json", stream=stream, journal=journal, journal_only=True)
        structlog.get_logger().info("one", machine="web")
        assert fields_of(journald.recv(1 << 16))["KVMD_MACHINE"] == "web"
        assert stream.getvalue() == ""


def test_what_the_journal_does_not_take_goes_to_the_stream_with_its_level(tmp_path: Path) -> None:
    stream = io.StringIO()
    with Journal(str(tmp_path / "nobody")) as journal:
        log.configure(log_format="json", stream=stream, journal=journal, journal_only=True)
        structlog.get_logger().warning("one", machine="web")
        assert journal.lost == 1
    assert stream.getvalue().startswith("<4>{")
    assert json.loads(stream.getvalue()[3:])["machine"] == "web"


def test_a_machine_s_log_goes_to_both(journald: socket.socket) -> None:
    stream = io.StringIO()
    with Journal(journald.getsockname()) as journal:
        log.configure(log_format="json", stream=stream, journal=journal)
        structlog.get_logger().info("one", machine="web")
        assert json.loads(stream.getvalue())["event"] == fields_of(journald.recv(1 << 16))["KVMD_EVENT"] == "one"


def test_the_journal_is_known_by_the_file_that_standard_error_is() -> None:
    about = os.fstat(2)
    assert is_stderr({"JOURNAL_STREAM": f"{about.st_dev}:{about.st_ino}"})
    assert not is_stderr({"JOURNAL_STREAM": f"{about.st_dev}:{about.st_ino + 1}"})
    assert not is_stderr({})
