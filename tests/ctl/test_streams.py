"""Events, conversions and logs, as they happen and as they are kept."""

from __future__ import annotations

import json
from functools import partial

import pytest

from kvmd.ranges import PageState
from tests.ctl.conftest import Kvmctl
from tests.ctl.running import with_pipes
from tests.ctl.serving import Daemon, http, stranger
from tests.fleet.fakes import FakeGuest


@pytest.fixture
def guest(kvmctl: Kvmctl, daemon: Daemon) -> str:
    assert kvmctl("run", "--detach", "builtin:hello", "--name", "one", "--memory", "16M").status == 0
    assert daemon.do(lambda: daemon.fleet.machine("one").state) == "running"
    return "one"


def convert(count: int, first: int = 0) -> object:
    def act(guest: FakeGuest) -> None:
        for number in range(first, first + count):
            guest.convert(number // 2 * 0x1000, to=PageState.PRIVATE if number % 2 else PageState.SHARED)

    return act


def do_convert(daemon: Daemon, count: int, first: int = 0) -> None:
    act = convert(count, first)
    assert callable(act)
    daemon.guest("one", act)


def end(daemon: Daemon) -> None:
    daemon.guest("one", lambda guest: guest.end())


# -- conversions


def test_the_last_conversions_and_those_above_a_number(kvmctl: Kvmctl, daemon: Daemon, guest: str) -> None:
    do_convert(daemon, 6)
    lines = kvmctl("conversions", guest, "-n", "2").out.splitlines()
    assert lines == [
        "00:00:00.000000  one  conversion 5: vcpu 0 implicit 0x2000 4 KiB private -> shared converted  1+2+3 us",
        "00:00:00.000000  one  conversion 6: vcpu 0 implicit 0x2000 4 KiB shared -> private converted  1+2+3 us",
    ]
    found = kvmctl("conversions", guest, "--since", "3", "-o", "json").lines
    assert [record["sequence"] for record in found] == [4, 5, 6]
    assert kvmctl("conversions", guest, "-n", "0").out == ""


def test_filters(kvmctl: Kvmctl, daemon: Daemon, guest: str) -> None:
    do_convert(daemon, 8)

    def numbers(*filters: str) -> list[int]:
        return [record["sequence"] for record in kvmctl("conversions", guest, "-o", "json", *filters).lines]

    assert numbers("--to", "shared") == [1, 3, 5, 7]
    assert numbers("--gpa", "0x1fff") == [3, 4]
    assert numbers("--gpa", "0x1000+8K", "--to", "private") == [4, 6]
    assert numbers("--gpa", "0x1000-0x1001") == [3, 4]
    assert numbers("--cause", "explicit") == []
    assert numbers("--vcpu", "1") == []
    assert kvmctl("conversions", guest, "--gpa", "5-4").status == 120


def test_more_conversions_than_a_page_and_what_was_forgotten(kvmctl: Kvmctl, daemon: Daemon, guest: str) -> None:
    do_convert(daemon, 2000)
    found = kvmctl("conversions", guest, "--since", "1", "-o", "json").lines
    assert found[0] == {"event": "lost", "lost": 2000 - 1024 - 1}
    assert [record["sequence"] for record in found[1:]] == list(range(977, 2001))
    # Who names none is not told of those that are always forgotten.
    assert len(kvmctl("conversions", guest, "-n", "5000", "-o", "json").lines) == 1024


def test_following_shows_each_once(daemon: Daemon, guest: str) -> None:
    do_convert(daemon, 4)
    with with_pipes(daemon.path, "conversions", "-f", guest, "-o", "json", "-n", "3", "--to", "shared") as follow:
        follow.until(b'"sequence":3')
        do_convert(daemon, 4, first=4)
        do_convert(daemon, 1, first=100)
        follow.until(b'"sequence":9')
        end(daemon)
        follow.rest()
        assert follow.wait() == 0


def test_what_happened_while_the_daemon_was_away_is_looked_up(daemon: Daemon, guest: str) -> None:
    with with_pipes(daemon.path, "conversions", "-f", guest, "-n", "1") as follow:
        do_convert(daemon, 1)
        follow.until(b"conversion 1:")
        daemon.stop()
        follow.until(b"trying again")
        daemon.start()
        do_convert(daemon, 2000, first=1)
        # Of 2,001 the fleet keeps 1,024: as many as are missing are told.
        seen = follow.until(b"conversion 2001:")
        end(daemon)
        follow.rest()
        assert follow.wait() == 0
    assert b"-- 976 events lost here --" in seen
    assert seen.count(b": vcpu 0") == 1023


# -- events


def test_events_of_all_machines_over_a_restart(kvmctl: Kvmctl, daemon: Daemon, guest: str) -> None:
    with with_pipes(daemon.path, "events", "--since", "0") as events:
        events.until(b"one  started")
        daemon.stop()
        events.until(b"trying again")
        daemon.start()
        daemon.guest(guest, lambda found: found.change("paused", "paused"))
        # The stream goes on where it was: nothing twice.
        assert b"created" not in events.until(b"one  paused")
        daemon.guest(guest, lambda found: found.end("killed", status=127, signal=9, message="killed\x1b[31m"))
        assert rb"killed\x1b[31m" in events.until(rb"killed\x1b[31m")
    assert kvmctl("ps", "-q").out == "one\n"


def test_events_of_one_machine_end_with_it(daemon: Daemon, guest: str) -> None:
    with with_pipes(daemon.path, "events", guest, "--since", "0", "-o", "json") as events:
        events.until(b"started")
        events.until(b"\n")
        do_convert(daemon, 1)
        end(daemon)
        lines = [json.loads(line) for line in events.rest().splitlines()]
        assert events.wait() == 0
    assert [(line["event"], line["id"]) for line in lines] == [("conversion", "3"), ("lifecycle", "4")]


def test_an_id_that_never_was(kvmctl: Kvmctl, daemon: Daemon, guest: str) -> None:
    del daemon
    for arguments, whose in (((guest,), f"{guest}'s events"), ((), "all machines' events")):
        outcome = kvmctl("events", *arguments, "--since", "never")
        assert outcome.status == 120
        assert f"--since: 'never' was never an id of {whose}" in outcome.err
        outcome = kvmctl("events", *arguments, "--since", "1" * 15_001)
        assert outcome.status == 120
        assert f"1' was never an id of {whose}" in outcome.err
        # Neither can be in a field of HTTP's.
        for impossible in ("1\n2", "\u2192"):
            outcome = kvmctl("events", *arguments, "--since", impossible)
            assert outcome.status == 120
            assert "is no id of an event" in outcome.err


def test_a_reader_that_has_enough_ends_it_quietly(daemon: Daemon, guest: str) -> None:
    with with_pipes(daemon.path, "events", guest, "--since", "0") as events:
        events.until(b"started")
        assert events.process.stdout is not None
        events.process.stdout.close()
        assert events.wait() == 0


def test_a_daemon_that_has_forgotten_an_event(kvmctl: Kvmctl, daemon: Daemon) -> None:
    # A stranger stands in for a daemon whose stream began anew: the id of the first is none of the second's.
    path = daemon.path
    daemon.stop()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 10000\r\n\r\n"
    first = head + b'id: 7\nevent: lifecycle\ndata: {"machine":"one","change":"started"}\n\nid: 8\nevent: life'
    problem = b'{"type":"urn:kvmd:problem:unknown-event","detail":"header.Last-Event-ID: it is not"}'
    refused = http(problem, status="422 No", kind="application/problem+json")
    second = head + b'id: 1\nevent: lifecycle\ndata: {"machine":"one","change":"ended"}\n\n'
    over = http(
        b'{"type":"urn:kvmd:problem:forbidden","detail":"enough"}', status="403 No", kind="application/problem+json"
    )
    with stranger(path, first, refused, second, over) as asked:
        outcome = kvmctl("events")
    assert outcome.status == 121
    assert outcome.out.splitlines() == ["one  started", "-- some events lost here --", "one  ended"]
    assert b"Last-Event-ID" not in asked[0]
    assert b"Last-Event-ID: 7" in asked[1]
    assert b"Last-Event-ID" not in asked[2]
    assert b"Last-Event-ID: 1" in asked[3]


# -- logs


def test_logs_are_escaped_and_end_with_what_is_kept(kvmctl: Kvmctl, daemon: Daemon, guest: str) -> None:
    def log(found: FakeGuest) -> None:
        found.write_log("first")
        found.log.add(b'{"timestamp":"2026-01-01T10:11:12.5Z","level":"info","event":"a\\u001b[2J","x":[1]}\n')
        found.log.add(b"no \x1b json\nunfinished")

    daemon.guest(guest, log)
    outcome = kvmctl("logs", guest)
    assert outcome.out.splitlines() == [
        "-  -        first",
        r"10:11:12.5  info     a\x1b[2J  x=[1]",
        r"no \x1b json",
        "unfinished",
    ]
    assert kvmctl("logs", guest, "-n", "1").out == "unfinished\n"
    assert kvmctl("logs", guest, "-o", "json").lines[0] == {"event": "first", "machine": "one"}


def test_following_a_log(daemon: Daemon, guest: str) -> None:
    for number in range(5):
        daemon.guest(guest, partial(FakeGuest.write_log, event=f"old-{number}"))
    with with_pipes(daemon.path, "logs", "-f", "-n", "2", guest) as logs:
        assert b"old-2" not in logs.until(b"old-4")
        daemon.guest(guest, lambda found: found.write_log("new"))
        logs.until(b"new")
        end(daemon)
        logs.rest()
        assert logs.wait() == 0


def test_what_the_guest_printed(kvmctl: Kvmctl, daemon: Daemon, guest: str) -> None:
    daemon.guest(guest, lambda found: found.print(b"a\r\n\x1b]0;title\x07\xff\n"))
    assert kvmctl("logs", "--console", guest).out.splitlines() == ["a", "\\x1b]0;title\\x07\N{REPLACEMENT CHARACTER}"]
    daemon.guest(guest, lambda found: found.end())
    assert kvmctl("logs", "--console", guest, "-o", "json").lines[0] == {"machine": "one", "text": "a"}
