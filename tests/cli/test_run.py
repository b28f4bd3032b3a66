import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
import trio
import trio.testing

from kvmd.cli import run as module
from kvmd.cli.main import run_cli
from kvmd.cli.run import spec_from
from kvmd.errors import ConfigError, HostError
from kvmd.guests import GUESTS
from kvmd.hv.vcpu import Registers
from kvmd.nonblocking import NonBlockingWriter
from kvmd.ranges import PageState
from kvmd.spec.machine import MachineSpec
from kvmd.stop import ExitStatus, Stop, StopReason
from kvmd.units import MIB
from tests.cli.fake_machine import FakeMachine, Script, does_nothing, machine_class


@pytest.fixture(autouse=True)
def structlog_as_it_was() -> Iterator[None]:
    yield
    structlog.reset_defaults()


class Runner:
    """Runs ``kvmd run`` on fake machines."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
        self._monkeypatch = monkeypatch
        self._capture = capfdbinary
        self.opened: list[FakeMachine] = []
        self.out = b""
        self.err = b""

    def run(self, *arguments: str, script: Script = does_nothing) -> int:
        fake = machine_class(script)
        self._monkeypatch.setattr(module, "Machine", fake)
        status = run_cli(["run", "builtin:hello", *arguments])
        self.opened = fake.opened
        self.out, self.err = self._capture.readouterr()
        return status

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.err.splitlines()]

    @property
    def names(self) -> list[str]:
        return [event["event"] for event in self.events]


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Runner:
    return Runner(monkeypatch, capfdbinary)


def test_the_guests_console_is_stdout_and_its_status_the_exit_status(runner: Runner) -> None:
    async def script(machine: FakeMachine) -> Stop:
        machine.print(b"hello\n\xff\x00")
        await trio.lowlevel.checkpoint()
        machine.print(b"bye")
        return Stop(StopReason.GUEST_EXIT, "all vCPUs ended", 42)

    assert runner.run(script=script) == 42
    assert runner.out == b"hello\n\xff\x00bye"
    assert runner.opened[0].closed


def test_the_last_line_of_the_log_says_why_and_how_much(runner: Runner) -> None:
    async def script(machine: FakeMachine) -> None:
        machine.convert(0x10000)
        machine.convert(0x10000, to=PageState.PRIVATE)
        await trio.lowlevel.checkpoint()

    assert runner.run(script=script) == 0
    assert runner.names == ["conversion", "conversion", "conversions", "machine-stopped"]
    last = runner.events[-1]
    assert (last["machine"], last["reason"], last["status"], last["level"]) == ("hello", "guest-exit", 0, "info")
    assert (last["converted"], last["spurious"], last["failed"]) == (2, 0, 0)


def test_a_guest_that_its_rate_slowed_down_is_told_so(runner: Runner) -> None:
    async def script(machine: FakeMachine) -> Stop:
        machine.held_back_us = 1_234_567
        await trio.lowlevel.checkpoint()
        return Stop(StopReason.GUEST_EXIT, "all vCPUs ended", 0)

    assert runner.run(script=script) == 0
    assert runner.names == ["conversions-held-back", "machine-stopped"]
    assert runner.events[0]["vcpu_seconds"] == 1.235


def test_a_guest_that_is_stopped_shows_its_registers_and_what_was_unclaimed(runner: Runner) -> None:
    async def script(machine: FakeMachine) -> Stop:
        machine.ports.read(0x80, 1)
        machine.mmio.count(0xFEE00000)
        await trio.lowlevel.checkpoint()
        registers = Registers(rip=0xDEAD)
        return Stop.because(StopReason.TRIPLE_FAULT, "triple fault", vcpu=1, registers=registers)

    assert runner.run(script=script) == ExitStatus.GUEST_FAULT
    assert runner.names == ["ports-unclaimed", "addresses-unclaimed", "registers", "machine-stopped"]
    ports, addresses, registers, last = runner.events
    assert (ports["accesses"], ports["first_ports"]) == (1, ["0x80"])
    assert (addresses["accesses"], addresses["first_gpas"]) == (1, ["0xfee00000"])
    assert (registers["vcpu"], registers["rip"]) == (1, "0xdead")
    assert (last["reason"], last["vcpu"], last["level"], last["status"]) == ("triple-fault", 1, "error", 122)


def test_conversions_go_to_a_file(runner: Runner, tmp_path: Path) -> None:
    async def script(machine: FakeMachine) -> None:
        for page in range(100):
            machine.convert(page * 4096)
        await trio.lowlevel.checkpoint()

    path = tmp_path / "conversions"
    assert runner.run("--conversions", str(path), script=script) == 0
    events = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert [event["sequence"] for event in events] == list(range(1, 101))
    assert runner.names[-2:] == ["conversions", "machine-stopped"]
    assert runner.events[-2]["shown"] == runner.names.count("conversion") == 10
    assert runner.events[-2]["suppressed"] == 90


def test_conversions_go_to_stderr_instead_of_the_sample(runner: Runner) -> None:
    async def script(machine: FakeMachine) -> None:
        for page in range(30):
            machine.convert(page * 4096)
        await trio.lowlevel.checkpoint()

    assert runner.run("--conversions", "-", script=script) == 0
    assert runner.names == ["conversion"] * 30 + ["machine-stopped"]
    assert "monotonic_ns" in runner.events[0]


def test_a_machine_that_cannot_be_opened_leaves_no_file_behind(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_spec: MachineSpec) -> FakeMachine:
        raise HostError("no /dev/kvm")

    path = tmp_path / "conversions"
    monkeypatch.setattr(FakeMachine, "open", fails)
    assert runner.run("--conversions", str(path)) == ExitStatus.HOST
    assert runner.err == b"kvmd: error: no /dev/kvm\n"
    assert not path.exists()


def test_a_file_that_cannot_be_written_closes_the_machine(runner: Runner, tmp_path: Path) -> None:
    assert runner.run("--conversions", str(tmp_path)) == ExitStatus.CONFIG
    assert b"Is a directory" in runner.err
    assert runner.opened[0].closed


def test_a_bug_in_the_machine_is_status_125_and_the_log_is_not_lost(runner: Runner) -> None:
    async def script(_machine: FakeMachine) -> None:
        await trio.lowlevel.checkpoint()
        structlog.get_logger().warning("last-words")
        raise ZeroDivisionError("oops")

    assert runner.run(script=script) == ExitStatus.INTERNAL
    assert b'"event":"last-words"' in runner.err
    assert b"ZeroDivisionError: oops" in runner.err
    assert runner.opened[0].closed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_the_machine_cleanly(runner: Runner, number: signal.Signals) -> None:
    async def script(machine: FakeMachine) -> Stop:
        signal.raise_signal(number)
        return await machine.wait_for_stop()

    before = signal.getsignal(number)
    assert runner.run(script=script) == ExitStatus.STOPPED
    assert runner.names == ["stopping", "machine-stopped"]
    assert runner.events[0]["signal"] == number.name
    assert runner.events[1]["reason"] == "operator"
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("ignored", [False, True])  # SIGINT: as a shell's script starts what is to run beside it
def test_a_signal_before_the_machine_runs_undoes_what_was_made(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, *, ignored: bool
) -> None:
    undone: list[int] = []

    def opening(_spec: MachineSpec) -> FakeMachine:
        try:
            signal.raise_signal(number)
        except BaseException:
            undone.append(number)
            raise
        raise HostError("no signal came")

    monkeypatch.setattr(FakeMachine, "open", opening)
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    if ignored:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        status = runner.run()
    finally:
        signal.signal(signal.SIGINT, before[signal.SIGINT])
    assert before == {each: signal.getsignal(each) for each in before}
    if ignored and number == signal.SIGINT:
        assert (status, undone) == (ExitStatus.HOST, [])
    else:
        assert (status, undone) == (ExitStatus.STOPPED, [number])


def test_a_signal_that_was_ignored_before_stays_ignored(runner: Runner) -> None:
    async def script(_machine: FakeMachine) -> None:
        signal.raise_signal(signal.SIGHUP)
        await trio.testing.wait_all_tasks_blocked()

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        runner.run(script=script)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert "stopping" not in runner.names


def test_a_second_signal_ends_the_process_at_once(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []

    def exit_(status: int) -> None:
        ended.append(status)

    monkeypatch.setattr(os, "_exit", exit_)

    async def script(machine: FakeMachine) -> Stop:
        signal.raise_signal(signal.SIGINT)
        stop = await machine.wait_for_stop()
        signal.raise_signal(signal.SIGTERM)
        return stop

    runner.run(script=script)
    assert ended == [ExitStatus.KILLED]
    assert b"kvmd: ended at once by another SIGTERM" in runner.err


def test_the_log_can_be_for_people_or_quiet(runner: Runner) -> None:
    async def script(machine: FakeMachine) -> None:
        machine.convert(0x10000)
        await trio.lowlevel.checkpoint()

    runner.run("--log-format", "console", script=script)
    assert b"conversion 1: vcpu 0 implicit 0x10000 4 KiB private -> shared converted" in runner.err
    assert b"\x1b[" not in runner.err
    runner.run("--log-level", "warning", script=script)
    assert runner.err == b""


def test_stdout_that_nobody_reads_to_its_end_does_not_stop_the_guest(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    of_fd = NonBlockingWriter.of_fd
    monkeypatch.setattr(NonBlockingWriter, "of_fd", staticmethod(lambda fd: of_fd(writing if fd == 1 else fd)))

    async def script(machine: FakeMachine) -> None:
        machine.print(b"hello")
        await trio.lowlevel.checkpoint()

    assert runner.run(script=script) == 0
    os.close(writing)
    assert runner.names == ["console-output-lost", "machine-stopped"]


def test_a_target_is_a_file_an_image_or_a_built_in_guest(tmp_path: Path) -> None:
    path = tmp_path / "m.toml"
    path.write_text('image = "g.elf"\nvcpus = 3\nmemory = "8M"\narguments = [1]')
    nothing: dict[str, object] = {"vcpus": None, "memory": None, "arguments": ()}
    assert spec_from(str(path), nothing) == MachineSpec(
        image=tmp_path / "g.elf", vcpus=3, memory=8 * MIB, arguments=(1,)
    )
    changed = spec_from(str(path), {"vcpus": 5, "memory": None, "arguments": (2, 3)})
    assert (changed.vcpus, changed.memory, changed.arguments) == (5, 8 * MIB, (2, 3))
    assert spec_from("builtin:hello", nothing).image == GUESTS["hello"].path
    assert spec_from("dir/guest.elf", nothing) == MachineSpec(image=Path("dir/guest.elf"), name="guest")
    with pytest.raises(ConfigError, match="vcpus: 0"):
        spec_from("guest.elf", {"vcpus": 0})


def test_options_override_and_are_named_as_the_file_names_them(runner: Runner) -> None:
    options = "--vcpus 4 --memory 16M --tripwire hole --cpl 0 --arg 7 --arg 0x10 --name web --protection none"
    assert runner.run(*options.split()) == 0
    assert runner.opened[0].spec == MachineSpec(
        image=GUESTS["hello"].path,
        name="web",
        vcpus=4,
        memory=16 * MIB,
        protection="none",
        tripwire="hole",
        cpl=0,
        arguments=(7, 16),
    )


def test_limits_that_nothing_would_enforce_are_refused(capfd: pytest.CaptureFixture[str]) -> None:
    limited = Path(__file__).parents[2] / "config" / "limits.toml"
    assert run_cli(["run", str(limited)]) == ExitStatus.CONFIG
    assert capfd.readouterr().err.startswith(
        "kvmd: error: limits: nothing would enforce them on a guest in the foreground"
    )
