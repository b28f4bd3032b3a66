from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from kvmd.guests import GUESTS
from tests.ctl.conftest import Kvmctl
from tests.ctl.running import Process, with_pipes
from tests.ctl.serving import Daemon
from tests.fleet.fakes import FakeFleet


def running(fleet: FakeFleet) -> bool:
    return any(info.state == "running" for info in fleet.machines())


def hear(daemon: Daemon, run: Process, name: str) -> None:
    """Wait until the guest runs, and what it prints is shown."""
    daemon.until(running)
    daemon.guest(name, lambda guest: guest.print(b"x"))
    run.until(b"x")


def test_the_console_is_shown_and_the_status_is_the_guest_s(daemon: Daemon) -> None:
    with with_pipes(daemon.path, "run", "builtin:hello") as run:
        daemon.until(running)
        daemon.guest("hello", lambda guest: guest.print(b"hi \xff\x1b[1m\n"))
        assert run.until(b"\n") == b"hi \xff\x1b[1m\n"
        daemon.guest("hello", lambda guest: guest.print(b"bye"))
        daemon.guest("hello", lambda guest: guest.end(status=7))
        assert run.rest() == b"bye"
        assert run.wait() == 7
    assert daemon.do(daemon.fleet.machines) == []


def test_a_machine_that_ends_without_a_word_of_its_guest_s(daemon: Daemon) -> None:
    with with_pipes(daemon.path, "run", "builtin:hello", "--keep") as run:
        daemon.until(running)
        daemon.guest("hello", lambda guest: guest.end("triple-fault", status=122, message="rip \x1b[31m0x10"))
        assert run.rest() == b"kvmctl: hello: triple-fault, status 122: rip \\x1b[31m0x10\n"
        assert run.wait() == 122
    assert [info.state for info in daemon.do(daemon.fleet.machines)] == ["stopped"]


def test_ctrl_c_stops_the_guest(daemon: Daemon) -> None:
    with with_pipes(daemon.path, "run", "builtin:hello") as run:
        hear(daemon, run, "hello")
        run.process.send_signal(signal.SIGINT)
        said = run.rest()
        assert run.wait() == 126
    assert b"stopping hello; once more to end it at once" in said
    assert b"operator, status 126" in said
    assert daemon.do(daemon.fleet.machines) == []


def test_ctrl_c_twice_ends_a_guest_that_does_not_stop(daemon: Daemon) -> None:
    with with_pipes(daemon.path, "run", "builtin:hello") as run:
        hear(daemon, run, "hello")
        daemon.guest("hello", lambda guest: setattr(guest, "stubborn", True))
        run.process.send_signal(signal.SIGINT)
        run.until(b"once more to end it at once")
        run.process.send_signal(signal.SIGTERM)
        run.until(b"once more to leave it alone")
        run.rest()
        assert run.wait() == 127


def linux(daemon: Daemon, name: str) -> str:
    path = daemon.path.parent / f"{name}.toml"
    path.write_text(f'kernel = "{GUESTS["hello"].path}"\nname = "{name}"\nmemory = "64M"\n')
    return str(path)


def test_ctrl_c_shuts_a_linux_guest_down(daemon: Daemon) -> None:
    with with_pipes(daemon.path, "run", linux(daemon, "one")) as run:
        hear(daemon, run, "one")
        run.process.send_signal(signal.SIGINT)
        said = run.rest()
        assert run.wait() == 0
    assert b"shutting one down; once more to stop it at once" in said
    assert b"guest-power-off, status 0" in said
    assert daemon.do(daemon.fleet.machines) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGALRM])
def test_a_linux_guest_that_does_not_shut_down_is_stopped(daemon: Daemon, number: signal.Signals) -> None:
    with with_pipes(daemon.path, "run", linux(daemon, "stubborn")) as run:
        hear(daemon, run, "stubborn")
        run.process.send_signal(signal.SIGINT)
        run.until(b"once more to stop it at once")
        run.process.send_signal(number)  # SIGALRM: its timer's
        said = run.rest()
        assert run.wait() == 126
    what = b"once more to end it at once" if number is signal.SIGINT else b"stubborn did not shut down within 30 s"
    assert what in said
    assert b"operator, status 126" in said


def test_a_reader_that_goes_away_ends_the_guest(daemon: Daemon) -> None:
    with with_pipes(daemon.path, "run", "builtin:hello") as run:
        hear(daemon, run, "hello")
        run.process.stdout.close()  # type: ignore[union-attr]  # there is one
        # Nothing is printed: that nobody reads is seen all the same.
        assert run.wait() == 0
    assert daemon.do(daemon.fleet.machines) == []


def test_a_daemon_that_restarts_costs_nothing(daemon: Daemon) -> None:
    with with_pipes(daemon.path, "run", "builtin:hello") as run:
        daemon.until(running)
        daemon.guest("hello", lambda guest: guest.print(b"one "))
        run.until(b"one ")
        daemon.stop()
        run.until(b"trying again")
        daemon.start()
        daemon.guest("hello", lambda guest: guest.print(b"two "))
        assert b"one " not in run.until(b"two ")
        daemon.guest("hello", lambda guest: guest.end(status=3))
        assert run.wait() == 3


def test_json_lines(daemon: Daemon) -> None:
    with with_pipes(daemon.path, "run", "builtin:hello", "-o", "json") as run:
        daemon.until(running)
        daemon.guest("hello", lambda guest: guest.print("ü".encode()[:1]))
        daemon.guest("hello", lambda guest: guest.print("ü".encode()[1:] + b"\n"))
        daemon.guest("hello", lambda guest: guest.end(status=3))
        lines = [json.loads(line) for line in run.rest().splitlines()]
    assert "".join(line["text"] for line in lines[:-1]) == "ü\n"
    assert lines[-1]["event"] == "end"
    assert lines[-1]["end"]["status"] == 3


def test_an_image_that_is_not_there(kvmctl: Kvmctl, daemon: Daemon, tmp_path: Path) -> None:
    outcome = kvmctl("run", str(tmp_path / "none.elf"))
    assert outcome.status == 120
    assert "none.elf: No such file or directory; kvmd says: " in outcome.err
    assert daemon.do(daemon.fleet.machines) == []


def test_an_image_that_would_never_be_read(kvmctl: Kvmctl, daemon: Daemon, tmp_path: Path) -> None:
    del daemon
    outcome = kvmctl("run", str(tmp_path))
    assert (outcome.status, outcome.err) == (
        120,
        f"kvmctl: error: the image {tmp_path} is not an ordinary file\n",
    )


def test_a_kernel_that_cannot_be_read_is_called_one(kvmctl: Kvmctl, daemon: Daemon, tmp_path: Path) -> None:
    del daemon
    spec = tmp_path / "linux.toml"
    spec.write_text('kernel = "."\n')
    outcome = kvmctl("run", str(spec))
    assert (outcome.status, outcome.err) == (120, f"kvmctl: error: the kernel {tmp_path} is not an ordinary file\n")
    spec.write_text('kernel = "none"\n')
    outcome = kvmctl("run", str(spec))
    assert outcome.err.startswith(f"kvmctl: error: cannot open the kernel {tmp_path}/none: No such file or directory")
