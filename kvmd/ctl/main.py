"""The ``kvmctl`` command: finds the subcommand, and turns every failure into one line and an exit status."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn

import click

from kvmd import __version__
from kvmd.ctl.errors import CtlError
from kvmd.ctl.session import SOCKET_VARIABLE, Session, common_options
from kvmd.ctl.statuses import Status, epilog
from kvmd.ctl.text import shown
from kvmd.errors import KvmdError
from kvmd.lazy_group import LazyGroup

PROGRAM = "kvmctl"
COMPLETION_VARIABLE = "_KVMCTL_COMPLETE"

COMMANDS = {
    "check": "Say whether kvmd answers, and what its host can do.",
    "run": "Create a machine, start it and follow its console.",
    "create": "Create a machine; it does not run yet.",
    "start": "Run machines that were created.",
    "stop": "Shut machines down, or stop them, and wait until they have.",
    "press": "Press Linux machines' power buttons.",
    "kill": "End machines at once.",
    "pause": "Take machines' vCPUs out of the guest.",
    "resume": "Let paused machines go on.",
    "rm": "Forget machines that do not run.",
    "ps": "List the machines.",
    "inspect": "Show all that is known of a machine.",
    "wait": "Wait until a machine is in a state.",
    "console": "Type into a machine's console, and see what it prints.",
    "agent": "Talk to the agent in a Linux machine.",
    "balloon": "Show or set how much memory a Linux machine does without.",
    "logs": "Show what a machine's process logged, or what its guest printed.",
    "conversions": "Show a machine's recent conversions, or all as they happen.",
    "events": "Show what happens to machines, as it happens.",
    "top": "Watch conversions, memory and latencies of all machines.",
    "map": "Draw a machine's memory: what is private, what is shared.",
    "completion": "Print what lets a shell complete commands and machines.",
}
"""Subcommands with their short help: each is the click command of its name in ``kvmd.ctl.commands``' module of its
name."""


class _Commands(LazyGroup):
    summaries = COMMANDS

    def find(self, name: str) -> object:
        return getattr(importlib.import_module(f"kvmd.ctl.commands.{name}"), f"{name}_command")


@click.group(
    PROGRAM,
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=epilog("1    what was waited for did not happen in time"),
)
@click.version_option(__version__, prog_name=PROGRAM, message="%(prog)s %(version)s")
def cli() -> None:
    """Control kvmd: machines whose memory is shared or private, and every conversion between the two.

    All commands take --socket and --output json; completion is set up by 'kvmctl completion --help'.
    """


cli = common_options(cli, variable=SOCKET_VARIABLE)


def main() -> NoReturn:
    """Run the command line and exit with its status."""
    if COMPLETION_VARIABLE in os.environ:
        _complete(os.environ[COMPLETION_VARIABLE])
    for file in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):
            # Whatever the locale cannot show must not end a stream; a standard file may be closed, too.
            file.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # what suppress is for
    sys.exit(run_cli())


def _complete(instruction: str) -> NoReturn:
    from click.shell_completion import shell_complete  # noqa: PLC0415 - only for shells

    sys.exit(shell_complete(cli, {"obj": Session()}, PROGRAM, COMPLETION_VARIABLE, instruction))


def run_cli(arguments: Sequence[str] | None = None) -> int:  # noqa: PLR0911 - a return for each way to fail
    """Run the command line and return its exit status.

    Args:
        arguments: those after the program's name; by default this process's.
    """
    session = Session()
    try:
        # Not cli.main(): it has ideas of its own about statuses.
        with cli.make_context(PROGRAM, list(sys.argv[1:] if arguments is None else arguments), obj=session) as context:
            status: Any = cli.invoke(context)
        sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message(), file=sys.stderr)
        return Status.REQUEST
    except click.exceptions.Exit as error:  # --help and --version
        return error.exit_code
    except click.ClickException as error:
        return _usage_error(session, error)
    except BrokenPipeError:
        # Whoever read the output has enough of it: that is how `kvmctl events | head` ends. Python would complain at
        # its exit about what is left.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), sys.stdout.fileno())
        return Status.DONE
    except (click.Abort, KeyboardInterrupt):
        return Status.STOPPED
    except CtlError as error:
        _say(session, str(error), error.document())
        return error.status
    except KvmdError as error:
        _say(session, str(error), {"type": "urn:kvmctl:problem:mistake", "detail": str(error)})
        return Status.REQUEST
    except Exception as error:  # noqa: BLE001 - the one place that says what becomes of a bug
        import traceback  # noqa: PLC0415 - 6 ms that only a bug needs

        traceback.print_exception(error)
        document: dict[str, object] = {"type": "urn:kvmctl:problem:internal", "detail": repr(error)}
        _say(session, "that is a bug of kvmctl's: please report it, with the lines above", document)
        return Status.INTERNAL
    return int(status or 0)


def _usage_error(session: Session, error: click.ClickException) -> int:
    context = error.ctx if isinstance(error, click.UsageError) else None
    hint = "" if context is None else f" (see '{context.command_path} --help')"
    message = error.format_message()
    _say(session, message + hint, {"type": "urn:kvmctl:problem:usage", "detail": message})
    return Status.REQUEST


def _say(session: Session, message: str, document: dict[str, object]) -> None:
    if session.wants_json:
        print(json.dumps(document), file=sys.stderr)
        return
    line = shown(" ".join(message.split()))
    print(f"{PROGRAM}: error: {line}", file=sys.stderr)
