import io
from collections.abc import Iterator

import pytest
import structlog
import trio
from rich.console import Console

from kvmd.cli import demo as module
from kvmd.cli.display import LiveDisplay, PlainDisplay
from kvmd.cli.main import run_cli
from kvmd.cli.summary import GuestResult, summary
from kvmd.conversion.messages import Outcome
from kvmd.conversion.stats import ConversionStats
from kvmd.guests import GUESTS
from kvmd.ranges import GpaRange, PageState
from kvmd.spec.machine import MachineSpec
from kvmd.stop import ExitStatus, Stop, StopReason
from kvmd.units import MIB, PAGE_SIZE
from tests.cli.fake_machine import FakeMachine, machine_class


@pytest.fixture(autouse=True)
def structlog_as_it_was() -> Iterator[None]:
    yield
    structlog.reset_defaults()


async def converts(machine: FakeMachine) -> None:
    machine.print(b"hello \x1b[2Jfrom the guest\nand more")
    for _ in range(1500):
        machine.convert(0x20_0000)
    machine.convert(0x30_0000, outcome=Outcome.SPURIOUS)
    structlog.get_logger().warning("odd-thing")
    await trio.lowlevel.checkpoint()


def test_a_demo_shows_each_guest_and_sums_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = machine_class(converts)
    monkeypatch.setattr(module, "Machine", fake)
    assert run_cli(["demo", "--vcpus", "2", "--guest", "pingpong", "--guest", "contend"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("pingpong: each vCPU walks")
    assert "  | hello ?[2Jfrom the guest" in lines
    assert "  | and more" in lines
    assert any("odd-thing" in line for line in lines)
    assert any(line.startswith("  passed: 1,500 conversions in ") for line in lines)
    assert any("implicit private → shared" in line and "1,500" in line for line in lines)
    assert any("spurious" in line for line in lines)
    assert any("Hottest pages" in line for line in lines)
    assert any("Memory of contend" in line for line in lines)
    assert lines[-1] == "2 of 2 guests passed."
    assert max(map(len, lines)) <= 120
    assert not any(line != line.rstrip() for line in lines)
    assert [machine.spec.vcpus for machine in fake.opened] == [2, 2]
    assert all(machine.closed for machine in fake.opened)


def test_by_default_all_well_behaved_guests_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = machine_class()
    monkeypatch.setattr(module, "Machine", fake)
    assert run_cli(["demo"]) == 0
    assert [machine.spec.name for machine in fake.opened] == ["hello", "pingpong", "contend", "explicit"]
    assert "Hottest" not in capsys.readouterr().out


def test_a_guest_that_fails_is_named_and_gives_the_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def fails(machine: FakeMachine) -> Stop | None:
        await trio.lowlevel.checkpoint()
        if machine.spec.name == "pingpong":
            return Stop.because(StopReason.TRIPLE_FAULT, "triple fault at 0x1000")
        return None

    monkeypatch.setattr(module, "Machine", machine_class(fails))
    assert run_cli(["demo", "--guest", "hello", "--guest", "pingpong"]) == ExitStatus.GUEST_FAULT
    captured = capsys.readouterr()
    assert "ended with status 122 (triple-fault: triple fault at 0x1000)" in captured.out
    assert captured.err == "kvmd: demo: not passed: pingpong\n"


def test_the_operators_stop_ends_the_demo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    async def stopped(_machine: FakeMachine) -> Stop:
        await trio.lowlevel.checkpoint()
        return Stop.because(StopReason.OPERATOR, "stopped by the operator")

    fake = machine_class(stopped)
    monkeypatch.setattr(module, "Machine", fake)
    assert run_cli(["demo"]) == ExitStatus.STOPPED
    assert len(fake.opened) == 1
    assert "Conversions" in capsys.readouterr().out


def result_of(machine: FakeMachine) -> GuestResult:
    return GuestResult(
        name="a-guest",
        stop=Stop(StopReason.GUEST_EXIT, "all vCPUs ended", 0),
        seconds=1.5,
        stats=machine.stats.snapshot(),
        memory_map=tuple(machine.memory_map()),
        mapped_at=1.25,
        memory_bytes=machine.spec.memory,
        pinned=machine.pinned,
    )


@pytest.fixture
def machine() -> FakeMachine:
    machine = FakeMachine(MachineSpec(image=GUESTS["hello"].path, memory=64 * MIB))
    machine.convert(0x20_0000)
    machine.convert(0x20_0000, to=PageState.PRIVATE)
    machine.convert(0x20_3000)
    return machine


def rendered(thing: object, *, terminal: bool, encoding: str = "utf-8") -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    console = Console(file=stream, force_terminal=terminal, width=80, color_system="standard" if terminal else None)
    console.print(thing)
    data = stream.buffer
    assert isinstance(data, io.BytesIO)
    return data.getvalue().decode(encoding)


def test_a_summary_has_percentiles_the_hottest_and_the_busy_part_of_memory(machine: FakeMachine) -> None:
    text = rendered(summary([result_of(machine)], unicode=True), terminal=False)
    lines = [line.rstrip() for line in text.splitlines()]
    assert any(line.split()[:2] == ["a-guest", "waiting"] for line in lines)
    assert ["total", "240", "240", "240", "240"] in [line.split() for line in lines]
    assert "0x200000 2" in text
    assert "0x200000 ███░" in text
    assert max(map(len, lines)) <= 80


def test_a_summary_without_unicode_is_ascii(machine: FakeMachine) -> None:
    text = rendered(summary([result_of(machine)], unicode=False), terminal=False, encoding="ascii")
    assert "private -> shared" in text
    assert "0x200000 ###." in text


def test_a_guest_that_converted_nothing_has_a_short_summary() -> None:
    stats = ConversionStats().snapshot()
    spec = MachineSpec(image=GUESTS["hello"].path)
    memory_map = ((GpaRange(0, spec.memory), PageState.PRIVATE),)
    result = GuestResult(
        "hello", Stop(StopReason.GUEST_EXIT, "", 0), 0.1, stats, memory_map, 0.0, spec.memory, GpaRange(0, PAGE_SIZE)
    )
    text = rendered(summary([result], unicode=True), terminal=False)
    assert "Hottest" not in text
    assert "Latency" not in text


def test_the_live_display_draws_memory_and_gives_the_terminal_back(machine: FakeMachine) -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80, height=30, _environ={"TERM": "xterm"})
    with LiveDisplay(console) as display:
        display.begin("a-guest", "does things")
        display.note("printed \\[bold]as it is")
        display.progress(machine, 1.0)
        display.end(result_of(machine))
    text = stream.getvalue()
    assert "3 conversions" in text
    assert "printed \\[bold]as it is" in text
    assert "0x1000000" in text
    assert "passed" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_the_plain_display_has_a_line_of_progress_now_and_then(machine: FakeMachine) -> None:
    stream = io.StringIO()
    with PlainDisplay(Console(file=stream, width=80)) as display:
        display.begin("a-guest", "does [things]")
        for tenth in range(50):
            display.progress(machine, tenth / 10)
        display.end(result_of(machine))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "a-guest: does [things]"
    assert [line.split(":")[0].strip() for line in lines[1:3]] == ["2 s", "4 s"]
    assert lines[3] == "  passed: 3 conversions in 1.50 s"
