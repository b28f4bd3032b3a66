"""The operator's terminal as a guest's: every key goes to the guest, and it is itself again whatever happens."""

from __future__ import annotations

import os
import signal
import termios
import tty
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress

import click

_ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT)

_AS_BEFORE = b"\x1b[0m\x1b[?25h"
"""Ends colours, and shows the cursor: a guest may have left them otherwise (ECMA-48 8.3.117, SGR 0)."""


def raw(fd: int) -> AbstractContextManager[None]:
    """Let every key through as it is, those too that would end or stop this process.

    Args:
        fd: of a terminal.
    """
    # TCSADRAIN: what was typed ahead is for the guest.
    return _changed(fd, lambda: tty.setraw(fd, termios.TCSADRAIN))


def keys(fd: int) -> AbstractContextManager[None]:
    """Let every key through at once and unseen, but for those that end or stop this process.

    Args:
        fd: of a terminal.
    """
    return _changed(fd, lambda: tty.setcbreak(fd, termios.TCSADRAIN))


@contextmanager
def _changed(fd: int, change: Callable[[], object]) -> Iterator[None]:
    """Change a terminal; signals that would end this process are KeyboardInterrupt meanwhile.

    Stopped by SIGTSTP the terminal is itself as well, and changed again when this process goes on.
    """
    before = termios.tcgetattr(fd)

    def restore() -> None:
        # A terminal that is gone needs nothing.
        with suppress(termios.error, OSError):
            termios.tcsetattr(fd, termios.TCSAFLUSH, before)

    def end(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    def stop(_number: int, _frame: object) -> None:
        restore()
        os.kill(os.getpid(), signal.SIGSTOP)

    def go_on(_number: int, _frame: object) -> None:
        with suppress(termios.error, OSError):
            change()

    handlers: dict[signal.Signals, Callable[[int, object], None]] = {
        **dict.fromkeys(_ENDING, end),
        signal.SIGTSTP: stop,
        signal.SIGCONT: go_on,
    }
    previous = {number: signal.getsignal(number) for number in handlers}
    try:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        change()
        yield
    finally:
        restore()
        for number, old in previous.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)


def as_before(fd: int) -> None:
    """Undo what a guest's output did to how a terminal shows text."""
    with suppress(OSError):
        os.write(fd, _AS_BEFORE)


def control_key(text: str) -> bytes:
    """Return the byte of a key such as ``ctrl-]`` or ``^]``.

    Raises:
        ValueError: it is none.
    """
    key = text.lower().removeprefix("ctrl-").removeprefix("^")
    if len(key) != 1 or key == text or not "@" <= key.upper() <= "_":
        raise ValueError(f"{text!r} is no key: write one such as ctrl-] or ^A")
    return bytes([ord(key.upper()) & 0x1F])


def detach_key(ctx: click.Context, parameter: click.Parameter, value: str) -> bytes:
    """Return the byte of the key that an option names."""
    try:
        return control_key(value)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, parameter) from error
