"""`kvmd bench`: its arguments, what it prints, and its failure lines. Nothing here is timed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import trio

from kvmd.benchmark import catalogue, qemu, sources
from kvmd.benchmark.catalogue import SUMMARIES
from kvmd.benchmark.measure import CannotMeasure, Fact, Options, Report, Series
from kvmd.cli.main import run_cli
from kvmd.errors import HostError
from kvmd.stop import ExitStatus


def test_help_lists_every_benchmark_with_what_it_measures(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["bench", "--help"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    for name, what in SUMMARIES.items():
        assert f"{name} {what}" in words
    assert "all every one of them that is not said to be apart" in words


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pingpang"], "there is no benchmark 'pingpang': there are conversions, growth,"),
        (["conversions", "--pages", "0"], "0 is not in the range"),
        (["conversions", "--rounds", "1"], "1 is not in the range"),
        (["conversions", "--memory", "lots"], "'--memory'"),
        (["conversions", "--tripwire", "string"], "'string' is not one of"),
        (["start", "--pages", "16"], "No such option"),
    ],
)
def test_a_wrong_command_line_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(["bench", *arguments]) == ExitStatus.CONFIG
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.count("\n") == 1


def a_report(name: str) -> Report:
    return Report(name, "title", facts=[Fact(Series("figure", "ms", (1.0, 3.0)))], missing=["no gcc"])


def fake_run(name: str, options: Options) -> Report:
    if name == "start":
        raise CannotMeasure("/dev/kvm is not there, or not accessible")
    assert options.quick
    return a_report(name)


def test_all_measures_the_rest_and_says_what_it_could_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(catalogue, "run", fake_run)
    output = tmp_path / "new" / "results.json"
    assert run_cli(["bench", "all", "--quick", "--output", str(output)]) == ExitStatus.HOST
    printed = capsys.readouterr()
    assert "kvmd: bench: start: not measured: /dev/kvm is not there, or not accessible\n" in printed.err
    assert "kvmd: bench: api: not measured: no gcc\n" in printed.err
    document = json.loads(output.read_text())
    assert [report["name"] for report in document["benchmarks"]] == [name for name in SUMMARIES if name != "start"]
    assert document["not_measured"] == {"start": "/dev/kvm is not there, or not accessible"}
    assert printed.out.count("| figure") == len(SUMMARIES) - 1


def test_what_was_measured_before_an_interruption_is_in_the_output(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(name: str, options: Options) -> Report:
        if name == "start":
            raise KeyboardInterrupt
        return fake_run(name, options)

    monkeypatch.setattr(catalogue, "run", interrupted)
    output = tmp_path / "results.json"
    assert run_cli(["bench", "all", "--quick", "--output", str(output)]) == ExitStatus.STOPPED
    names = list(SUMMARIES)
    before = names[: names.index("start")]
    assert [report["name"] for report in json.loads(output.read_text())["benchmarks"]] == before


def test_an_interruption_leaves_no_file_that_holds_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(catalogue, "run", mock.Mock(side_effect=KeyboardInterrupt))
    output = tmp_path / "results.json"
    assert run_cli(["bench", "api", "--output", str(output)]) == ExitStatus.STOPPED
    assert list(tmp_path.iterdir()) == []
    output.write_text("of yesterday")
    assert run_cli(["bench", "api", "--output", str(output)]) == ExitStatus.STOPPED
    assert [path.read_text() for path in tmp_path.iterdir()] == ["of yesterday"]


def test_a_disk_that_fills_up_leaves_the_last_results_whole(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(catalogue, "run", fake_run)
    output = tmp_path / "results.json"
    output.write_text("of yesterday")

    def half(path: Path, text: str, encoding: str) -> None:
        path.write_bytes(text[:10].encode(encoding))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    assert run_cli(["bench", "api", "--quick", "--output", str(output)]) == ExitStatus.HOST
    assert [path.read_text() for path in tmp_path.iterdir()] == ["of yesterday"]
    *_, line = capsys.readouterr().err.splitlines()
    assert line == f"kvmd: error: {output} cannot be written any more: No space left on device"


def test_an_output_may_be_a_link_or_no_file_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(catalogue, "run", fake_run)
    link, file, pipe = tmp_path / "link", tmp_path / "file", tmp_path / "pipe"
    link.symlink_to(file)
    assert run_cli(["bench", "api", "--quick", "--output", str(link)]) == 0
    assert link.is_symlink()
    assert json.loads(file.read_text())["name"] == "api"
    os.mkfifo(pipe)
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert run_cli(["bench", "api", "--quick", "--output", str(pipe)]) == 0
        assert json.loads(os.read(reading, 1 << 16))["name"] == "api"
    finally:
        os.close(reading)
    assert pipe.is_fifo()


def test_what_a_program_said_in_several_lines_is_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(catalogue, "run", mock.Mock(side_effect=CannotMeasure("bare: this\nand that\n")))
    assert run_cli(["bench", "large"]) == ExitStatus.HOST
    assert capsys.readouterr().err == "kvmd: bench: large: not measured: bare: this and that\n"


def test_a_terminal_is_told_what_was_measured_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(catalogue, "run", fake_run)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert run_cli(["bench", "start", "--quick"]) == ExitStatus.HOST
    shown = capsys.readouterr().err
    assert shown.startswith("measuring 1/1 start ...\r\x1b[Kkvmd: bench: start: not measured: ")
    assert "measured start" not in shown
    assert run_cli(["bench", "api", "--quick"]) == 0
    assert "\r\x1b[Kmeasured 1/1 api in 0 s\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (HostError("no room"), "no room"),
        (ExceptionGroup("", [CannotMeasure("lost")]), "lost"),
        (FileNotFoundError(2, "No such file", "qemu"), "qemu is not here: No such file"),
        (subprocess.TimeoutExpired(["/there/floor"], 60.0), "floor did not end within 60 s"),
    ],
)
def test_what_a_host_lacks_is_no_bug(error: Exception, message: str) -> None:
    def measure() -> Report:
        raise error

    with pytest.raises(CannotMeasure, match=message):
        catalogue.under_conditions(measure)


def test_json_is_all_that_is_on_stdout(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(catalogue, "run", fake_run)
    assert run_cli(["bench", "api", "--quick", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "api"
    assert run_cli(["bench", "start", "--quick", "--json"]) == ExitStatus.HOST
    assert capsys.readouterr().out == ""


def test_an_output_that_cannot_be_written_is_told_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(catalogue, "run", lambda *_: pytest.fail("it was measured"))
    (tmp_path / "file").touch()
    assert run_cli(["bench", "api", "--output", str(tmp_path / "file" / "results.json")]) == ExitStatus.CONFIG
    assert capsys.readouterr().err.count("\n") == 1


def test_without_kvm_there_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    assert run_cli(["bench", "conversions", "--quick"]) == ExitStatus.HOST
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "kvmd: bench: conversions: not measured: /dev/kvm is not there, or not accessible\n"


def test_sigterm_ends_what_was_started_as_ctrl_c_does(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    ended = []

    async def forever() -> None:
        # While the loop is asleep, which is when an exception out of nowhere would leave everything as it is.
        trio.lowlevel.current_trio_token().run_sync_soon(os.kill, os.getpid(), signal.SIGTERM)
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.lowlevel.checkpoint()
            ended.append(True)

    def terminated(*_: object) -> Report:
        trio.run(forever)
        pytest.fail("it went on")

    monkeypatch.setattr(catalogue, "run", terminated)
    assert run_cli(["bench", "api"]) == ExitStatus.STOPPED
    assert ended == [True]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(("option", "value"), [("--protection", "walls"), ("--memory", "5000")])
def test_a_machine_that_there_cannot_be_is_one_line(
    option: str, value: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda *_: True)
    assert run_cli(["bench", "conversions", option, value]) == ExitStatus.CONFIG
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"kvmd: error: {option.removeprefix('--')}")


@pytest.mark.kvm
@pytest.mark.compiler
def test_conversions_have_their_keys(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--pages", "3", "--rounds", "4", "--vcpus", "2", "--turns", "2", "--tripwire", "guest_memfd"]
    assert run_cli(["bench", "conversions", *arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["conversions"] == 2 * 3 * 2 * 3
    assert found["first_round_conversions"] == 2 * 3 * 2
    assert found["per_second"] == pytest.approx(1e6 / found["us_per_conversion"], rel=0.01)
    assert found["us_in_kvm"] > 0
    assert found["runs"] == 2
    for mode in ("service", "early", "thread"):
        assert found[f"floor_{mode}"]["conversions"] == found["conversions"]
        ratio = found[f"ratio_{mode}"]
        assert ratio["min"] <= ratio["median"] <= ratio["max"]
        assert ratio["rounds"] == 2
    assert {"load_before", "stolen_percent", "python", "python_optimised"} <= found["conditions"].keys()


def test_turns_are_no_load_of_their_own(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("kvmd.benchmark.conversions.measure", lambda _, turns: a_report(f"both {turns}"))
    monkeypatch.setattr("kvmd.benchmark.conversions.measure_load", lambda *_: a_report("one"))
    for options, name in (((), "one"), (("--turns", "3"), "both 3")):
        assert run_cli(["bench", "conversions", *(options or ("--pages", "2")), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["name"] == name


@pytest.mark.kvm
def test_without_a_compiler_kvmd_s_own_figures_are_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("KVMD_BENCH_BUILD", str(tmp_path))
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert run_cli(["bench", "conversions", "--pages", "2", "--rounds", "2", "--turns", "1", "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["conversions"] == 4
    assert "ratio_service" not in found
    assert found["missing"] == ["the C program `floor` needs a C compiler: install gcc"]
    assert (
        printed.err == "kvmd: bench: conversions: not measured: the C program `floor` needs a C compiler: install gcc\n"
    )


@pytest.mark.kvm
def test_a_guest_that_cannot_run_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["bench", "conversions", "--pages", "4096", "--memory", "16M"]) == ExitStatus.HOST
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("kvmd: bench: conversions: not measured: kvmd stopped the guest: ")
    assert "do not fit into" in line


def test_without_its_sources_a_program_is_missed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sources, "PROGRAMS", tmp_path)
    with pytest.raises(CannotMeasure, match="run kvmd from its source tree"):
        sources.build_floor()


def test_without_qemu_its_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(CannotMeasure, match="QEMU microvm needs qemu-system-x86_64: install qemu-system-x86"):
        qemu.need_qemu()


@pytest.mark.compiler
def test_a_program_that_cannot_be_compiled_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bare.c").write_text("int main(void) { return nothing; }\n")
    monkeypatch.setattr(sources, "PROGRAMS", tmp_path)
    monkeypatch.setenv("KVMD_BENCH_BUILD", str(tmp_path / "build"))
    with pytest.raises(CannotMeasure, match=r"`bare` cannot be compiled: .*error"):
        sources.build_bare()


@pytest.mark.compiler
def test_a_program_is_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bare.c").write_text("int main(void) { return 0; }\n")
    monkeypatch.setattr(sources, "PROGRAMS", tmp_path)
    monkeypatch.setenv("KVMD_BENCH_BUILD", str(tmp_path / "build"))
    program = sources.build_bare()
    before = program.stat()
    assert sources.build_bare().stat() == before
    assert [path.name for path in program.parent.iterdir()] == ["bare"]
