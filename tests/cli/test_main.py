import errno
import subprocess
import sys

import click
import pytest

from kvmd import __version__
from kvmd.cli import main
from kvmd.cli.main import cli, run_cli
from kvmd.errors import BackendError, ConfigError, HostError, ImageError, KvmdError
from kvmd.lazy_group import LazyGroup
from kvmd.stop import ExitStatus


def failing_command(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    @click.command()
    def fails() -> None:
        raise error

    monkeypatch.setattr(LazyGroup, "get_command", lambda *_: fails)


def test_the_help_lists_the_commands_without_importing_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["--help"]) == 0
    out = capsys.readouterr().out
    for name, text in main.COMMANDS.items():
        assert name in out
        assert text in out


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["--version"]) == 0
    assert capsys.readouterr().out == f"kvmd {__version__}\n"


@pytest.mark.parametrize("name", main.COMMANDS)
def test_each_command_is_where_the_table_says_and_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    context = click.Context(cli)
    command = cli.get_command(context, name)
    assert command is not None
    assert command.name == name
    assert run_cli([name, "--help"]) == 0
    assert "Exit status" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rnu"], "No such command 'rnu'"),
        (["check", "--jsn"], "No such option"),
        (["run"], "there is nothing to run"),
        (["run", "x.elf", "--vcpus", "many"], "'many' is not a valid integer"),
        (["run", "x.elf", "--memory", "64Q"], "'64Q' is not a size"),
        (["run", "x.elf", "--arg", "x"], "'x' is not a whole number"),
        (["run", "x.elf", "--cpl", "1"], "--cpl"),
        (["demo", "--guest", "nobody"], "--guest"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_status_120(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(arguments) == ExitStatus.CONFIG
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("kvmd: error: ")
    assert said in captured.err
    assert "--help'" in captured.err
    assert captured.err.count("\n") == 1


def test_no_command_at_all_is_answered_with_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli([]) == ExitStatus.CONFIG
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("Usage: ")
    assert "\n  check  " in captured.err


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError("wrong"), ExitStatus.CONFIG),
        (ImageError("wrong"), ExitStatus.CONFIG),
        (HostError("wrong"), ExitStatus.HOST),
        (BackendError("wrong"), ExitStatus.HOST_FAULT),
        (KvmdError("wrong"), ExitStatus.HOST_FAULT),
        (ExceptionGroup("nursery", [ExceptionGroup("inner", [ConfigError("wrong")])]), ExitStatus.CONFIG),
    ],
)
def test_an_error_of_kvmds_is_one_line_with_its_status(
    error: Exception, status: ExitStatus, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing_command(monkeypatch, error)
    assert run_cli(["any"]) == status
    assert capsys.readouterr().err == "kvmd: error: wrong\n"


def test_a_limit_of_open_files_is_the_hosts_and_no_bug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing_command(monkeypatch, OSError(errno.EMFILE, "Too many open files"))
    assert run_cli(["any"]) == ExitStatus.HOST
    assert capsys.readouterr().err == (
        "kvmd: error: Too many open files: raise the limit (ulimit -n), or a unit's LimitNOFILE=\n"
    )


def test_a_message_of_several_lines_becomes_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing_command(monkeypatch, ConfigError("first\n  second"))
    run_cli(["any"])
    assert capsys.readouterr().err == "kvmd: error: first second\n"


def test_a_bug_has_its_traceback_and_status_125(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing_command(monkeypatch, ZeroDivisionError("oops"))
    assert run_cli(["any"]) == ExitStatus.INTERNAL
    err = capsys.readouterr().err
    assert "ZeroDivisionError: oops" in err
    assert err.splitlines()[-1].startswith("kvmd: error: that is a bug of kvmd's")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), BaseExceptionGroup("nursery", [KeyboardInterrupt()])])
def test_an_interrupt_is_the_operators_stop(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    failing_command(monkeypatch, error)
    assert run_cli(["any"]) == ExitStatus.STOPPED


def test_main_exits_with_the_status() -> None:
    with pytest.raises(SystemExit) as caught:
        main.main(["rnu"])
    assert caught.value.code == ExitStatus.CONFIG


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603 - our own interpreter
        [sys.executable, *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def test_it_runs_as_a_module() -> None:
    result = run_python("-m", "kvmd", "--version")
    assert (result.returncode, result.stdout) == (0, f"kvmd {__version__}\n")


def test_output_that_nobody_reads_to_its_end_is_no_failure() -> None:
    code = (
        "import os, sys\n"
        "reading, writing = os.pipe()\n"
        "os.dup2(writing, 1)\n"
        "os.close(reading)\n"
        "os.close(writing)\n"
        "from kvmd.cli.main import main\n"
        "main(['--help'])\n"
    )
    result = run_python("-c", code)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("command", ["run", "check"])
def test_a_start_imports_nothing_that_takes_long(command: str) -> None:
    code = (
        "import sys\n"
        "from kvmd.cli.main import run_cli\n"
        f"run_cli(['{command}', '--help'])\n"
        "heavy = {'rich', 'pygments', 'hypothesis', 'kvmd.cli.demo', 'asyncio.events', '_ssl'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    result = run_python("-c", code)
    assert (result.returncode, result.stderr) == (0, "")


def test_rich_can_be_imported_after_structlog_was() -> None:
    code = (
        "from kvmd.cli.startup import import_structlog_without_rich as start\n"
        "start(); start()\n"
        "import structlog, rich.console\n"
        "assert structlog.dev.rich is None\n"
    )
    assert run_python("-c", code).returncode == 0


def test_what_is_imported_lazily_is_the_module_itself_once_it_is_used() -> None:
    code = (
        "import sys\n"
        "from kvmd.cli.startup import import_lazily\n"
        "import_lazily()\n"
        "import asyncio as before\n"
        "import ssl\n"
        "import asyncio\n"
        "assert 'asyncio.events' not in sys.modules and '_ssl' not in sys.modules\n"
        "assert ssl.SSLContext is sys.modules['ssl'].SSLContext and '_ssl' in sys.modules\n"
        "import asyncio.subprocess\n"
        "assert before.run is sys.modules['asyncio'].run is asyncio.run\n"
        "from asyncio import *\n"
        "assert Future is asyncio.Future\n"
        "assert not hasattr(before, 'no_such_thing')\n"
    )
    assert run_python("-c", code).returncode == 0


@pytest.mark.parametrize("closed", ["0", "1", "2", "0, 1, 2"])
def test_standard_files_that_are_missing_are_dev_null(closed: str) -> None:
    code = (
        "import os, sys\n"
        f"for fd in ({closed},): os.close(fd)\n"
        "sys.stdout = sys.stderr = None\n"
        "from kvmd.cli.startup import open_standard_files\n"
        "open_standard_files()\n"
        "print('nobody'); print('nobody', file=sys.stderr)\n"
        "fd = os.open('/dev/zero', os.O_RDONLY)\n"
        "os._exit(0 if fd > 2 else 1)\n"
    )
    assert run_python("-c", code).returncode == 0
