"""top, map and check."""

from __future__ import annotations

import json
import signal
import termios

import pytest

from kvmd.ctl.figures import Counted, Hot, HotPages, Rates
from kvmd.ctl.top_view import as_text
from kvmd.ctl.watching import Look
from kvmd.ranges import GpaRange, PageState
from tests.ctl.conftest import Kvmctl
from tests.ctl.running import on_terminal, with_pipes
from tests.ctl.serving import Daemon
from tests.fleet.fakes import FakeGuest


@pytest.fixture
def guest(kvmctl: Kvmctl, daemon: Daemon) -> str:
    assert kvmctl("run", "--detach", "builtin:hello", "--name", "one", "--memory", "16M").status == 0
    assert daemon.do(lambda: daemon.fleet.machine("one").state) == "running"
    return "one"


def convert(guest: FakeGuest) -> None:
    for _ in range(3):
        guest.convert(0x5000)
    guest.convert(0x200000, size_bytes=0x10000)
    guest.convert(0x5000, to=PageState.PRIVATE)


# -- top


def counted(to_shared: int = 0, to_private: int = 0, other: int = 0, held_back_us: int = 0) -> Counted:
    return Counted(to_shared, to_private, other, 0, 0, ((0, 0), (0, 0), (0, 0)), 0, held_back_us)


def test_rates() -> None:
    rates = Rates()
    first = rates.row("one", "running", 10.0, counted(5, 5, 5))
    assert (first.to_shared, first.to_private, first.other) == (0, 0, 0)
    second = rates.row("one", "running", 12.0, counted(25, 6, 5))
    assert (second.to_shared, second.to_private, second.other) == (10, 0.5, 0)
    assert second.held_back == 0
    # Another machine of that name begins anew.
    assert rates.row("one", "running", 13.0, counted(1)).to_shared == 0
    rates.keep([])
    assert rates.row("one", "running", 14.0, counted(100)).to_shared == 0


def test_a_machine_that_its_rate_slows_down_is_shown_with_it() -> None:
    rates = Rates()
    rates.row("one", "running", 10.0, counted(held_back_us=500_000))
    row = rates.row("one", "running", 12.0, counted(held_back_us=3_500_000))
    assert (row.held_back, row.document()["held_back_vcpus"]) == (1.5, 1.5)
    assert "running, held back 150%" in as_text(Look([row], []))
    assert "held back" not in as_text(Look([rates.row("one", "running", 14.0, counted(held_back_us=3_500_001))], []))


def hot(*ranges: tuple[str, int]) -> dict[str, object]:
    return {"hottest": [{"gpa": gpa, "size": 4096, "count": count, "overcount": 0} for gpa, count in ranges]}


def test_what_grows_is_hotter_than_what_was_hot() -> None:
    pages = HotPages()
    pages.begin()
    pages.add("one", 10.0, hot(("0x1000", 500), ("0x2000", 7)))
    pages.add("two", 10.0, hot(("0x3000", 600)))
    assert [(each.machine, each.gpa) for each in pages.hottest()] == [
        ("two", "0x3000"),
        ("one", "0x1000"),
        ("one", "0x2000"),
    ]
    pages.begin()
    pages.add("one", 12.0, hot(("0x1000", 500), ("0x2000", 17)))
    (first, *others) = pages.hottest()
    assert first == Hot("one", "0x2000", 4096, 17, 5.0)
    assert [each.per_second for each in others] == [0.0]
    # Another machine of that name begins anew, and so does one that was away.
    pages.begin()
    pages.add("one", 13.0, hot(("0x2000", 3)))
    pages.add("two", 13.0, hot(("0x3000", 900)))
    assert [each.per_second for each in pages.hottest()] == [0.0, 0.0]


def test_no_more_than_a_few_are_shown() -> None:
    pages = HotPages()
    pages.add("one", 1.0, hot(*((hex(number << 12), number) for number in range(9))))
    assert [each.times for each in pages.hottest()] == [8, 7, 6, 5, 4]


def test_top_for_programs(kvmctl: Kvmctl, daemon: Daemon, guest: str) -> None:
    daemon.guest(guest, convert)
    (look,) = kvmctl("top", "-n", "1", "-i", "0.05", "-o", "json").lines
    (machine,) = look["machines"]
    assert machine["name"] == guest
    assert machine["shared_bytes"] == 0x10000
    assert machine["waiting_us"] == {"p50": 1.0, "p99": 1.0}
    assert look["hottest"][0] == {"machine": "one", "gpa": "0x5000", "size": 4096, "count": 4, "per_second": 0.0}


def test_top_in_a_pipe(daemon: Daemon, kvmctl: Kvmctl, guest: str) -> None:
    kvmctl("create", "builtin:hello", "--name", "two")
    daemon.guest(guest, convert)
    with with_pipes(daemon.path, "top", "-i", "0.05") as top:
        seen = top.until(b"two")
        assert b"MACHINE" in seen
        assert b"64 KiB" in seen
        daemon.guest(guest, convert)
        top.until(b"HOTTEST")
        top.process.send_signal(signal.SIGINT)
        top.rest()
        assert top.wait() == 0


def test_top_on_a_terminal(daemon: Daemon, guest: str) -> None:
    with on_terminal(daemon.path, "top", "-i", "0.05") as top:
        before = termios.tcgetattr(top.reading)
        top.until(b"one")
        daemon.guest(guest, convert)
        top.until(b"0x5000")
        daemon.stop()
        top.until(b"\x1b[31mkvmd")
        daemon.start()
        top.until(b"0x5000")
        top.type(b"q")
        # The screen that was there before comes back (xterm's private mode 1049).
        top.until(b"\x1b[?1049l")
        assert top.wait() == 0
        assert termios.tcgetattr(top.reading) == before


# -- map


def test_the_map(kvmctl: Kvmctl, daemon: Daemon, guest: str) -> None:
    daemon.guest(guest, convert)
    lines = kvmctl("map", guest, "--rows", "2", "--columns", "32").out.splitlines()
    assert lines[0] == "one: 15.9 MiB private, 64 KiB shared, in 3 ranges"
    assert lines[1].startswith("0x000000 ")
    cells = lines[1].partition(" ")[2] + lines[2].partition(" ")[2]
    assert len(cells) == 64
    assert cells[8] in "▒+"
    assert "1 cell = 256 KiB" in lines[3]
    zoomed = kvmctl("map", guest, "--gpa", "0x1f0000+128K", "--rows", "1", "--columns", "32").out.splitlines()
    assert zoomed[1].partition(" ")[2] in {"█" * 16 + "░" * 16, "#" * 16 + "." * 16}
    assert "\x1b[32m" in kvmctl("map", guest, "--color", "always").out
    daemon.guest(guest, lambda found: setattr(found, "pinned", GpaRange(0, 1 << 20)))
    lines = kvmctl("map", guest, "--rows", "2", "--columns", "32").out.splitlines()
    assert lines[0] == "one: 15.9 MiB private, 64 KiB shared, 1 MiB pinned, in 4 ranges"
    assert lines[1].partition(" ")[2][:5] in {"▓▓▓▓█", "@@@@#"}


def test_the_map_for_programs(kvmctl: Kvmctl, daemon: Daemon, guest: str) -> None:
    daemon.guest(guest, convert)
    assert kvmctl("map", guest, "-o", "json").json == {
        "machine": "one",
        "ranges": [
            {"gpa": "0x0", "size": 0x200000, "state": "private", "pinned": False},
            {"gpa": "0x200000", "size": 0x10000, "state": "shared", "pinned": False},
            {"gpa": "0x210000", "size": (16 << 20) - 0x210000, "state": "private", "pinned": False},
        ],
    }
    part = kvmctl("map", guest, "-o", "json", "--gpa", "0x20ffff").json["ranges"]
    assert [each["gpa"] for each in part] == ["0x200000"]


def test_a_machine_that_has_ended_has_no_map(kvmctl: Kvmctl, guest: str) -> None:
    kvmctl("kill", guest)
    outcome = kvmctl("map", guest)
    assert outcome.status == 120
    assert "this one is stopped" in outcome.err


# -- check and inspect


@pytest.mark.usefixtures("daemon")
def test_check(kvmctl: Kvmctl) -> None:
    outcome = kvmctl("check")
    assert outcome.status == 0
    assert "answers, and can run guests on this host." in outcome.out
    assert "tripwires      hole" in outcome.out
    assert json.loads(kvmctl("check", "-o", "json").out)["host"]["usable"] is True


def test_check_waits_for_a_daemon_that_starts(kvmctl: Kvmctl, daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon.stop()
    assert kvmctl("check").status == 121
    monkeypatch.setattr("kvmd.ctl.commands.check.time.sleep", lambda _: daemon.start())
    outcome = kvmctl("check", "--wait", "20")
    assert outcome.status == 0
    assert outcome.err == ""


def test_inspect_says_nothing_as_python_does(kvmctl: Kvmctl, guest: str) -> None:
    lines = [line.split(maxsplit=1) for line in kvmctl("inspect", guest).out.splitlines()]
    assert ["entropy", "no"] in lines
    assert ["disks", "-"] in lines
    assert ["cmdline", "-"] in lines
    assert not any("[" in line[-1] for line in lines if line)


def test_inspect(kvmctl: Kvmctl, daemon: Daemon, guest: str) -> None:
    daemon.guest(guest, convert)
    out = kvmctl("inspect", guest).out
    assert "16 MiB" in out
    assert "cause=implicit to=shared outcome=converted count=4" in out
    assert kvmctl("inspect", guest, "-o", "json").json[0]["counters"]["shared_bytes"] == 0x10000
