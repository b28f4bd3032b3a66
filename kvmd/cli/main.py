"""The ``kvmd`` command: finds the subcommand, and turns every failure into one line and an exit status.

Subcommands are imported when they are called: a guest's first instruction should not wait for the imports of
commands that nobody asked for.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from kvmd import __version__
from kvmd.cli.startup import import_lazily, import_structlog_without_rich, open_standard_files
from kvmd.errors import ConfigError, HostError, ImageError, KvmdError
from kvmd.lazy_group import LazyGroup
from kvmd.stop import ExitStatus

COMMANDS = {
    "check": "Say what this host can do, and what it cannot.",
    "run": "Run one guest in the foreground.",
    "demo": "Run the built-in guests, and show what they converted.",
    "bench": "Measure kvmd beside floors and peers.",
    "daemon": "Look after machines, each a process of its own.",
    "machine-process": "Be the process of one machine of the daemon's.",
}
"""Subcommands with their short help: each is the click command of its name in ``kvmd.cli``'s module of its name, with
``_`` for ``-``."""


class _Commands(LazyGroup):
    summaries = COMMANDS

    def find(self, name: str) -> object:
        import_lazily()
        import_structlog_without_rich()
        name = name.replace("-", "_")
        return getattr(importlib.import_module(f"kvmd.cli.{name}"), name)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="kvmd", message="%(prog)s %(version)s")
def cli() -> None:
    """Run KVM guests whose memory is shared or private, and watch every conversion between the two."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its status."""
    open_standard_files()
    sys.exit(run_cli(arguments))


def run_cli(arguments: Sequence[str] | None = None) -> int:  # noqa: PLR0911 - a return for each way to fail
    """Run the command line and return its exit status.

    Args:
        arguments: those after the program's name; by default this process's.
    """
    try:
        # Not cli.main(): it has ideas of its own about statuses.
        with cli.make_context("kvmd", list(sys.argv[1:] if arguments is None else arguments)) as context:
            status: Any = cli.invoke(context)
        sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message(), file=sys.stderr)
        return ExitStatus.CONFIG
    except click.exceptions.Exit as error:  # --help and --version
        return error.exit_code
    except click.ClickException as error:
        return _usage_error(error)
    except BrokenPipeError:
        # Whoever read the output has enough of it: that is how `kvmd check | head` ends. Python would complain at
        # its exit about what is left.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (click.Abort, KeyboardInterrupt):
        return ExitStatus.STOPPED
    except (Exception, BaseExceptionGroup) as error:  # noqa: BLE001 - the one place that says what becomes of a bug
        return _failure(error)
    return int(status or 0)


def _usage_error(error: click.ClickException) -> int:
    context = error.ctx if isinstance(error, click.UsageError) else None
    hint = "" if context is None else f" (see '{context.command_path} --help')"
    _say(error.format_message() + hint)
    return ExitStatus.CONFIG


def _failure(error: BaseException) -> int:
    # Nurseries wrap what ends them, even where it is the only one.
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    match error:
        case ConfigError() | ImageError():
            _say(str(error))
            return ExitStatus.CONFIG
        case HostError():
            _say(str(error))
            return ExitStatus.HOST
        case KvmdError():
            _say(str(error))
            return ExitStatus.HOST_FAULT
        case KeyboardInterrupt():
            return ExitStatus.STOPPED
        case OSError(errno=errno.EMFILE | errno.ENFILE):
            _say(f"{error.strerror}: raise the limit (ulimit -n), or a unit's LimitNOFILE=")
            return ExitStatus.HOST
        case _:
            traceback.print_exception(error)
            _say("that is a bug of kvmd's: please report it, with the lines above")
            return ExitStatus.INTERNAL


def _say(message: str) -> None:
    lines = " ".join(message.split())
    print(f"kvmd: error: {lines}", file=sys.stderr)
