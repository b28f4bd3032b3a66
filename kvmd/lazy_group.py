"""A command line whose subcommands are imported when they are called: nobody waits for what nobody asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import click


class LazyGroup(click.Group):
    """A group that lists its commands without importing them.

    Attributes:
        summaries: subcommands with their short help, in the order of the help.
    """

    summaries: ClassVar[Mapping[str, str]] = {}

    def find(self, name: str) -> object:
        """Import a subcommand and return it."""
        raise NotImplementedError

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names, in the order of the help."""
        del ctx
        return list(self.summaries)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a command."""
        del ctx
        if cmd_name not in self.summaries:
            return None
        command = self.find(cmd_name)
        assert isinstance(command, click.Command)  # noqa: S101 - a module of ours that breaks its one rule is a bug
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing them."""
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl(list(self.summaries.items()))
