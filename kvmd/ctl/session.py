"""What all commands share: their options, how they ask the daemon, and how they say what it answered."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import update_wrapper
from typing import TYPE_CHECKING, Any, TypeVar

import click

from kvmd.ctl.statuses import epilog

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from kvmd.ctl.client import Client

SOCKET_VARIABLE = "KVMD_SOCKET"
COMPLETION_SECONDS = 1.0

_F = TypeVar("_F", bound=Callable[..., Any])


class Session:
    """One call of kvmctl.

    Attributes:
        path: of the daemon's socket; None for the one by default.
        wants_json: whether answers are for programs.
    """

    def __init__(self) -> None:
        self.path: str | None = None
        self.wants_json = False

    def client(self, *, watch_output: bool = False) -> Client:
        """Return what asks the daemon.

        Args:
            watch_output: whether streams end where nobody reads this command's output any more.
        """
        # Later than at the start of kvmctl: --help and a mistake on the command line need none.
        from kvmd.ctl.client import Client  # noqa: PLC0415 - as said

        return Client(self.path, output=_descriptor(sys.stdout) if watch_output else None)

    def answer(self, document: object, text: str | None) -> None:
        """Say what a command came to.

        Args:
            document: for programs; nothing is lost of what the daemon said.
            text: for people; nothing where it is None.
        """
        if self.wants_json:
            print(json.dumps(document, indent=2 if sys.stdout.isatty() else None))
        elif text is not None:
            print(text)

    def line(self, document: Mapping[str, object], text: str) -> None:
        """Say one thing of many, at once."""
        # JSON as ASCII: nothing in it can do anything to a terminal.
        print(json.dumps(document, separators=(",", ":")) if self.wants_json else text, flush=True)

    def note(self, text: str) -> None:
        """Say on stderr what is not an answer."""
        print(f"kvmctl: {text}", file=sys.stderr, flush=True)


def _descriptor(file: object) -> int | None:
    try:
        number = file.fileno()  # type: ignore[attr-defined]  # whatever it is in a test
    except (AttributeError, OSError, ValueError):
        return None
    return int(number)


def _of(ctx: click.Context) -> Session:
    session = ctx.find_root().ensure_object(Session)
    assert isinstance(session, Session)  # noqa: S101 - nobody else sets it
    return session


def _set_socket(ctx: click.Context, _parameter: click.Parameter, value: str | None) -> None:
    if value is None:
        return
    if not value:
        raise click.BadParameter("the socket's path is empty")
    _of(ctx).path = value


def _set_output(ctx: click.Context, _parameter: click.Parameter, value: str | None) -> None:
    if value is not None:
        _of(ctx).wants_json = value == "json"


def common_options(command: _F, *, variable: str | None = None) -> _F:
    """Add the options that every command has; they may stand before its name too.

    Args:
        command: to add them to.
        variable: of the environment, that names the socket where the option does not.
    """
    socket = click.option(
        "--socket",
        metavar="PATH",
        envvar=variable,
        expose_value=False,
        callback=_set_socket,
        help=f"kvmd's socket; also {SOCKET_VARIABLE}.  [default: /run/kvmd/kvmd.sock]",
    )
    output = click.option(
        "-o",
        "--output",
        type=click.Choice(["text", "json"]),
        expose_value=False,
        callback=_set_output,
        help="For people, or for programs.  [default: text]",
    )
    return socket(output(command))


def ctl_command(name: str, *, statuses: Sequence[str] = ()) -> Callable[[Callable[..., int | None]], click.Command]:
    """Return what makes a command of a function whose first argument is the session.

    Args:
        name: the command's.
        statuses: lines on exit statuses of its own.
    """

    def make(function: Callable[..., int | None]) -> click.Command:
        def called(*arguments: Any, **named: Any) -> int | None:
            return function(_of(click.get_current_context()), *arguments, **named)

        wrapped = common_options(update_wrapper(called, function))
        return click.command(name, epilog=epilog(*statuses))(wrapped)

    return make


class MachineName(click.ParamType[str]):
    """A machine's name, which a shell can complete.

    Args:
        states: of the machines that the command is for; any where it is empty.
    """

    name = "machine"

    def __init__(self, *states: str) -> None:
        self._states = states

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the name as it is: the daemon knows what names there are."""
        if not value:
            self.fail("a machine's name is not empty", param, ctx)
        # Bytes that are no text would not get through HTTP either.
        return str(value).encode("utf-8", "backslashreplace").decode()

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return the machines that there are; none where the daemon does not say."""
        del param
        from click.shell_completion import CompletionItem  # noqa: PLC0415 - only for shells

        session = Session()
        session.path = _of(ctx).path
        try:
            machines = session.client().get("/v1/machines", seconds=COMPLETION_SECONDS)["machines"]
            found = [(str(machine["name"]), str(machine["state"])) for machine in machines]
        except Exception:  # noqa: BLE001 - a shell has no place for what went wrong
            return []
        return [
            CompletionItem(name, help=state)
            for name, state in found
            if name.startswith(incomplete) and name.isprintable() and (not self._states or state in self._states)
        ]


def machine_argument(*states: str, many: bool = False) -> Callable[[_F], _F]:
    """Return the argument that names a machine, or several.

    Args:
        states: see ``MachineName``.
        many: whether there may be several.
    """
    kind = MachineName(*states)
    if many:
        return click.argument("names", metavar="MACHINE...", nargs=-1, required=True, type=kind)
    return click.argument("name", metavar="MACHINE", type=kind)
