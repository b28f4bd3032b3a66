from __future__ import annotations

import os
import signal
import termios

import pytest

from kvmd.ctl.terminal import control_key
from tests.ctl.conftest import Kvmctl
from tests.ctl.running import on_terminal, with_pipes
from tests.ctl.serving import Daemon


@pytest.fixture
def guest(kvmctl: Kvmctl, daemon: Daemon) -> str:
    assert kvmctl("run", "--detach", "builtin:hello", "--name", "one").out == "one\n"
    assert daemon.do(lambda: daemon.fleet.machine("one").state) == "running"
    return "one"


def typed(daemon: Daemon, wanted: bytes) -> None:
    daemon.until(lambda fleet: bytes(fleet.guest("one").input) == wanted)


def test_keys_reach_the_guest_and_ctrl_bracket_detaches(daemon: Daemon, guest: str) -> None:
    with on_terminal(daemon.path, "console", guest) as console:
        before = termios.tcgetattr(console.reading)
        console.until(b"Ctrl-] ends the connection")
        daemon.guest(guest, lambda found: found.print(b"login: \x1b[1m"))
        console.until(b"login: \x1b[1m")
        # Raw by now: Ctrl-C and Ctrl-Z are the guest's, and a line needs no end.
        console.type(b"root\x03\x1a")
        typed(daemon, b"root\x03\x1a")
        console.type(b"\x1dnever sent")
        assert b"detached from one" in console.until(b"detached from one")
        assert console.wait() == 0
        assert termios.tcgetattr(console.reading) == before
    assert daemon.do(lambda: daemon.fleet.machine("one").state) == "running"
    typed(daemon, b"root\x03\x1a")


def test_the_end_of_the_machine_ends_it(daemon: Daemon, guest: str) -> None:
    with on_terminal(daemon.path, "console", guest) as console:
        before = termios.tcgetattr(console.reading)
        console.until(b"Ctrl-] ends")
        daemon.guest(guest, lambda found: found.print(b"last words"))
        daemon.guest(guest, lambda found: found.end("triple-fault", status=122, message="rip 0x10"))
        console.until(b"last words")
        console.until(b"one has ended: triple-fault, status 122: rip 0x10")
        assert console.wait() == 0
        assert termios.tcgetattr(console.reading) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_gives_the_terminal_back(daemon: Daemon, guest: str, number: signal.Signals) -> None:
    with on_terminal(daemon.path, "console", guest) as console:
        before = termios.tcgetattr(console.reading)
        daemon.guest(guest, lambda found: found.print(b"there"))
        console.until(b"there")
        console.process.send_signal(number)
        assert console.wait() == 126
        assert termios.tcgetattr(console.reading) == before


def test_a_stop_from_elsewhere_gives_the_terminal_back_meanwhile(daemon: Daemon, guest: str) -> None:
    with on_terminal(daemon.path, "console", guest) as console:
        before = termios.tcgetattr(console.reading)
        daemon.guest(guest, lambda found: found.print(b"there"))
        console.until(b"there")
        console.process.send_signal(signal.SIGTSTP)
        _, status = os.waitpid(console.process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        assert termios.tcgetattr(console.reading) == before
        console.process.send_signal(signal.SIGCONT)
        console.type(b"on")
        typed(daemon, b"on")
        console.type(b"\x1d")
        assert console.wait() == 0
        assert termios.tcgetattr(console.reading) == before


def test_detaching_works_though_the_guest_reads_nothing(daemon: Daemon, guest: str) -> None:
    with on_terminal(daemon.path, "console", guest) as console:
        daemon.guest(guest, lambda found: found.print(b"there"))
        console.until(b"there")
        for _ in range(400):
            console.type(b"x" * 1024)
        console.type(b"\x1d")
        console.until(b"detached from one")
        assert console.wait() == 0


def test_another_detach_key(daemon: Daemon, guest: str) -> None:
    with on_terminal(daemon.path, "console", guest, "--detach-key", "^A") as console:
        console.until(b"Ctrl-A ends")
        console.type(b"\x1d")
        typed(daemon, b"\x1d")
        console.type(b"\x01")
        assert console.wait() == 0


def test_input_from_a_pipe_ends_and_output_goes_on(daemon: Daemon, guest: str) -> None:
    with with_pipes(daemon.path, "console", guest) as console:
        console.type(b"reboot\n\x1d")
        console.process.stdin.close()  # type: ignore[union-attr]  # there is one
        typed(daemon, b"reboot\n\x1d")
        daemon.guest(guest, lambda found: found.print(b"bye"))
        console.until(b"bye")
        daemon.guest(guest, lambda found: found.end())
        assert b"one has ended: guest-exit, status 0" in console.rest()
        assert console.wait() == 0


def test_a_daemon_that_stops_is_told_apart_from_a_machine_that_ends(daemon: Daemon, guest: str) -> None:
    with with_pipes(daemon.path, "console", guest) as console:
        daemon.guest(guest, lambda found: found.print(b"there"))
        console.until(b"there")
        daemon.stop()
        said = console.rest()
        assert console.wait() == 121
    assert b"kvmd closed the console of one: it stops, or restarts, and the machine goes on" in said


def test_an_unknown_machine(kvmctl: Kvmctl, guest: str) -> None:
    outcome = kvmctl("console", guest + "e")
    assert outcome.status == 120
    assert outcome.err == "kvmctl: error: there is no machine onee: did you mean one?\n"


@pytest.mark.parametrize(("text", "key"), [("ctrl-]", b"\x1d"), ("^A", b"\x01"), ("Ctrl-b", b"\x02"), ("^@", b"\0")])
def test_control_keys(text: str, key: bytes) -> None:
    assert control_key(text) == key


@pytest.mark.parametrize("text", ["", "a", "^", "ctrl-", "ctrl-ab", "^1", "]"])
def test_what_is_no_control_key(text: str) -> None:
    with pytest.raises(ValueError, match="is no key"):
        control_key(text)
