"""``kvmd run``: one guest in the foreground."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path

import click
import structlog
import trio

from kvmd import log
from kvmd.cli.foreground import Foreground, signals_interrupt
from kvmd.errors import ConfigError
from kvmd.log_buffer import LogBuffer
from kvmd.machine import Machine
from kvmd.nonblocking import NonBlockingWriter, write_within
from kvmd.options import log_options, machine_options
from kvmd.runnable import SHUTDOWN_SECONDS
from kvmd.spec.machine import MachineSpec, load_spec, resolve_file, resolve_image
from kvmd.stop import RESERVED_STATUSES, ExitStatus, LinuxStatus

STDERR = "-"
_LAST_WORDS_SECONDS = 1.0

_EPILOG = f"""\b
Exit status: the guest's own, 0 to {RESERVED_STATUSES.start - 1} and {RESERVED_STATUSES.stop} to 255, or
  {ExitStatus.CONFIG:d}  the command line, the machine's file or the image is wrong
  {ExitStatus.HOST:d}  the host lacks a device, a permission, a capability or memory
  {ExitStatus.GUEST_FAULT:d}  the guest cannot go on (triple fault, ...): the log says why
  {ExitStatus.EXHAUSTED:d}  the machine ran out of something bounded, such as memslots
  {ExitStatus.HOST_FAULT:d}  the host failed under the running guest
  {ExitStatus.INTERNAL:d}  a bug of kvmd's
  {ExitStatus.STOPPED:d}  stopped by SIGINT (Ctrl-C), SIGTERM or SIGHUP
  {ExitStatus.KILLED:d}  the same once more: ended at once
A Linux guest is first asked to shut down, by its power button: the status is then {LinuxStatus.POWERED_OFF:d}.
Where it has not after {SHUTDOWN_SECONDS:.0f} s, it is stopped, and by a second signal at once.
"""


@click.command(epilog=_EPILOG)
@click.argument("target", metavar="SPEC.toml|GUEST.elf|builtin:NAME", required=False)
@click.option("--kernel", metavar="FILE", help="Run Linux: a bzImage, or an ELF vmlinux with PVH.")
@click.option("--initrd", metavar="FILE", help="Linux's initial RAM disk.")
@click.option("--cmdline", metavar="TEXT", help="The kernel's command line, such as 'console=ttyS0'.")
@machine_options
@click.option(
    "--conversions",
    metavar="FILE",
    help="Write every conversion to FILE (emptied first), one JSON line each; - for stderr.",
)
@log_options
def run(
    target: str | None,
    conversions: str | None,
    log_format: log.LogFormat | None,
    log_level: log.LogLevel,
    **overrides: object,
) -> int:
    """Run one guest in the foreground.

    The guest's console goes to stdout, the log to stderr. The guest is described by a TOML file (see config/), or
    is an ELF file, or one of those that kvmd brings along, such as builtin:hello, or is Linux (--kernel); options
    override the file.
    """
    spec = spec_from(target, overrides)
    if spec.limits.given:
        raise ConfigError(
            "limits: nothing would enforce them on a guest in the foreground: leave [limits] out and start kvmd with "
            "`systemd-run --scope -p MemoryMax=...`, or run it as the daemon's (kvmctl run)"
        )
    with ExitStack() as stack:
        buffer = LogBuffer(is_terminal=sys.stderr.isatty())
        # Whatever happens, what was logged last is what matters most.
        stack.callback(lambda: write_within(2, buffer.take(), _LAST_WORDS_SECONDS))
        log.configure(
            log_format=log_format or ("console" if buffer.isatty() else "json"), stream=buffer, level=log_level
        )
        stack.enter_context(signals_interrupt())
        machine = stack.enter_context(Machine.open(spec))
        stdout = stack.enter_context(NonBlockingWriter.of_fd(1))
        stderr = stack.enter_context(NonBlockingWriter.of_fd(2))
        file: NonBlockingWriter | None = None
        if conversions == STDERR:
            file = stderr
        elif conversions is not None:
            # Last: a machine that cannot be opened leaves no file behind.
            file = stack.enter_context(NonBlockingWriter.of_path(Path(conversions)))
        foreground = Foreground(
            machine,
            stdout=stdout,
            stderr=stderr,
            conversions=file,
            log_buffer=buffer,
            samples=log_level in {"debug", "info"} and conversions != STDERR,
            log=structlog.get_logger("kvmd"),
        )
        return trio.run(foreground.run).status


def spec_from(target: str | None, overrides: dict[str, object]) -> MachineSpec:
    """Return the machine that the command line asks for.

    Args:
        target: a TOML file, an image, or ``builtin:`` and a name; None where ``overrides`` has a kernel.
        overrides: fields of the spec; None or an empty tuple where the command line said nothing.

    Raises:
        ConfigError: there is no such machine.
    """
    given = {key: value for key, value in overrides.items() if value not in (None, ())}
    for key in given.keys() & {"kernel", "initrd"}:
        given[key] = resolve_file(key, given[key], base=Path())
    if target is None:
        kernel = given.pop("kernel", None)
        if not isinstance(kernel, Path):
            raise click.UsageError("there is nothing to run: name a TOML file, an image, builtin:NAME or --kernel FILE")
        return MachineSpec(kernel=kernel).with_overrides(**given)
    if target.endswith(".toml"):
        return load_spec(Path(target)).with_overrides(**given)
    return MachineSpec(image=resolve_image(target, base=Path())).with_overrides(**given)
