"""kvmctl and a Linux guest's devices: stop, press, balloon and agent."""

from __future__ import annotations

import pytest

from kvmd.guests import GUESTS
from tests.ctl.conftest import Kvmctl
from tests.ctl.running import Process, with_pipes
from tests.ctl.serving import Daemon

MIB = 1 << 20


@pytest.fixture
def make(daemon: Daemon, kvmctl: Kvmctl) -> Kvmctl:
    """Return what makes a Linux guest run, by name."""

    def made(name: str) -> object:
        file = daemon.path.parent / f"{name}.toml"
        file.write_text(
            f'kernel = "{GUESTS["hello"].path}"\nname = "{name}"\nmemory = "64M"\nagent = "a"\n'
            'balloon = true\nballoon_target = "8 MiB"\n'
        )
        outcome = kvmctl("run", "--detach", str(file))
        assert outcome.status == 0, outcome.err
        return outcome

    return made  # type: ignore[return-value]


def test_stop_shuts_a_linux_guest_down(make: Kvmctl, kvmctl: Kvmctl) -> None:
    make("one")
    outcome = kvmctl("stop", "one")
    assert (outcome.status, outcome.out, outcome.err) == (0, "one\n", "")
    assert kvmctl("wait", "one").out == "one: guest-power-off, status 0: ended\n"


def test_a_guest_that_does_not_shut_down_is_stopped_all_the_same(make: Kvmctl, kvmctl: Kvmctl) -> None:
    make("stubborn")
    outcome = kvmctl("stop", "stubborn", "--timeout", "0.1")
    assert (outcome.status, outcome.out) == (0, "stubborn\n")
    assert outcome.err == "kvmctl: stubborn did not shut down within 0.1 s, and is stopped\n"
    assert kvmctl("wait", "stubborn").out == "stubborn: operator, status 126: stopped by the operator\n"


@pytest.mark.parametrize("how", ["--now", "paused"])
def test_a_guest_is_not_asked_where_it_is_not_to_be_or_cannot_hear(make: Kvmctl, kvmctl: Kvmctl, how: str) -> None:
    make("one")
    if how == "paused":
        kvmctl("pause", "one")
    assert kvmctl("stop", "one", *([how] if how == "--now" else [])).status == 0
    assert kvmctl("wait", "one").out.startswith("one: operator")


def test_press(make: Kvmctl, kvmctl: Kvmctl) -> None:
    make("stubborn")
    assert kvmctl("press", "stubborn").out == "stubborn\n"
    assert kvmctl("ps", "-q", "--state", "running").out == "stubborn\n"
    kvmctl("pause", "stubborn")
    assert "(kvmctl resume lets it go on)" in kvmctl("press", "stubborn").err
    kvmctl("run", "--detach", "builtin:hello", "--name", "payload")
    outcome = kvmctl("press", "payload")
    assert outcome.status == 120
    assert "payload: the machine has no power button" in outcome.err


def test_balloon(make: Kvmctl, kvmctl: Kvmctl) -> None:
    make("one")
    line = "one: does without 4 MiB of 8 MiB; has given back 0 B; takes up 16 MiB\n"
    assert kvmctl("balloon", "one").out == line
    line = "one: does without 8 MiB of 16 MiB; has given back 8 MiB; takes up 16 MiB\n"
    assert kvmctl("balloon", "one", "16M").out == line
    document = {"machine": "one", "target": 16 * MIB, "actual": 8 * MIB, "given_back": 8 * MIB, "held": 16 * MIB}
    assert kvmctl("balloon", "one", "-o", "json").json == document
    for size, said in (("64M", "target: 67108864 is not a number of whole pages"), ("x", "'x' is not a size")):
        outcome = kvmctl("balloon", "one", size)
        assert outcome.status == 120
        assert said in outcome.err


def end_of_input(process: Process) -> None:
    assert process.process.stdin is not None
    process.process.stdin.close()


def test_the_agent_answers(make: Kvmctl, kvmctl: Kvmctl, daemon: Daemon) -> None:
    make("one")
    with with_pipes(daemon.path, "agent", "one", "--timeout", "0.2") as agent:
        agent.type(b"hello\n")
        assert agent.until(b"HELLO\n") == b"HELLO\n"
        other = kvmctl("agent", "one")
        assert other.status == 120
        assert "somebody else talks to the agent" in other.err
        agent.type(b"x" * 20_000)
        assert agent.until(b"X" * 20_000)
        end_of_input(agent)
        assert agent.wait() == 0


def test_an_agent_that_says_nothing_is_a_status(make: Kvmctl, daemon: Daemon) -> None:
    make("one")
    with with_pipes(daemon.path, "agent", "one", "--timeout", "0.1") as agent:
        end_of_input(agent)
        assert b"the agent of one said nothing" in agent.rest()
        assert agent.wait() == 1


def test_the_machines_end_ends_the_agents_connection(make: Kvmctl, daemon: Daemon) -> None:
    make("one")
    with with_pipes(daemon.path, "agent", "one") as agent:
        agent.type(b"hello\n")
        agent.until(b"HELLO\n")
        daemon.guest("one", lambda guest: guest.end())
        assert b"the machine has ended, or kvmd stops" in agent.rest()
        assert agent.wait() == 121
