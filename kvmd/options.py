"""Options that several commands share. Light on purpose: values are checked by ``kvmd.spec``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from kvmd.units import parse_size

_F = TypeVar("_F", bound=Callable[..., Any])


def parse_size_option(ctx: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """Return the bytes of a size such as ``64M``."""
    try:
        return None if value is None else parse_size(value)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, parameter) from error


def _numbers(ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> tuple[int, ...]:
    """Return whole numbers, written in decimal or with 0x."""
    numbers = []
    for value in values:
        try:
            numbers.append(int(value, 0))
        except ValueError as error:
            message = f"{value!r} is not a whole number: write one such as 16 or 0x10"
            raise click.BadParameter(message, ctx, parameter) from error
    return tuple(numbers)


def machine_options(command: _F) -> _F:
    """Add what overrides a machine's file: None where it was not given."""
    for option in reversed(
        (
            click.option("--name", help="The machine's name in the log.  [default: from the image]"),
            click.option("--vcpus", type=int, metavar="N", help="Virtual CPUs.  [default: 1]"),
            click.option(
                "--memory",
                callback=parse_size_option,
                metavar="SIZE",
                help="Guest memory, such as 64M.  [default: 64M]",
            ),
            click.option(
                "--accelerator",
                type=click.Choice(["auto", "kvm", "software"]),
                help="What runs the guest: KVM, or a CPU emulated in software.  [default: auto, KVM where it works]",
            ),
            click.option(
                "--protection",
                metavar="KIND",
                help="Where private memory comes from: emulated, guest-memfd, none, or auto for the strongest that "
                "this host offers.  [default: emulated; none for Linux]",
            ),
            click.option(
                "--tripwire",
                type=click.Choice(["auto", "attribute", "guest_memfd", "hole"]),
                help="What makes the view that is not live trip.  [default: auto]",
            ),
            click.option(
                "--initial",
                type=click.Choice(["private", "shared"]),
                help="The state that the guest's own memory starts in.  [default: private; shared for Linux]",
            ),
            click.option(
                "--cpl", type=click.Choice([0, 3]), metavar="3|0", help="Privilege level of the guest.  [default: 3]"
            ),
            click.option(
                "--arg",
                "arguments",
                callback=_numbers,
                multiple=True,
                metavar="N",
                help="A number for the guest's boot information; repeat it for more, up to 8.",
            ),
        )
    ):
        command = option(command)
    return command


def log_options(command: _F) -> _F:
    """Add how the log looks."""
    for option in reversed(
        (
            click.option(
                "--log-format",
                type=click.Choice(["json", "console"]),
                help="[default: console on a terminal, json elsewhere]",
            ),
            click.option(
                "--log-level",
                type=click.Choice(["debug", "info", "warning", "error"]),
                default="info",
                show_default=True,
                help="The lowest level that is shown.",
            ),
        )
    ):
        command = option(command)
    return command
