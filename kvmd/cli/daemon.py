"""``kvmd daemon``: looks after machines, each a process of its own."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path

import click
import trio

from kvmd import log
from kvmd.cli.options import log_options
from kvmd.console_pump import OutputPump
from kvmd.fleet.daemon import run_daemon
from kvmd.fleet.local import LocalFleet
from kvmd.log_buffer import LogBuffer
from kvmd.nonblocking import NonBlockingWriter, write_within
from kvmd.stop import ExitStatus

_LAST_WORDS_SECONDS = 1.0


_EPILOG = f"""\b
Exit status: 0 after SIGTERM or SIGINT, or
  {ExitStatus.CONFIG:d}  the command line is wrong
  {ExitStatus.HOST:d}  the state folder cannot be used, or another daemon uses it
  {ExitStatus.INTERNAL:d}  a bug of kvmd's
"""


@click.command(epilog=_EPILOG)
@click.option(
    "--state",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("/run/kvmd/state"),
    show_default=True,
    help="The folder that knows all machines; made where it is missing.",
)
@click.option(
    "--drain", "drain_seconds", type=click.FloatRange(0), default=10.0, show_default=True, help="Seconds to finish in."
)
@click.option("--stop-machines", is_flag=True, help="Stop all machines at the end; they go on otherwise.")
@log_options
def daemon(
    *,
    state: Path,
    drain_seconds: float,
    stop_machines: bool,
    log_format: log.LogFormat | None,
    log_level: log.LogLevel,
) -> int:
    """Look after machines until SIGTERM or SIGINT: docs/daemon.md."""
    with ExitStack() as stack:
        buffer = LogBuffer(is_terminal=sys.stderr.isatty())
        stack.callback(lambda: write_within(2, buffer.take(), _LAST_WORDS_SECONDS))
        log.configure(
            log_format=log_format or ("console" if buffer.isatty() else "json"), stream=buffer, level=log_level
        )
        stderr = stack.enter_context(NonBlockingWriter.of_fd(2))

        folder = state.absolute()

        async def run() -> None:
            pump = OutputPump(buffer, stderr, lambda _: None)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pump.run)
                try:
                    await run_daemon(folder, serve, drain_seconds=drain_seconds, stop_machines=stop_machines)
                finally:
                    pump.end()

        trio.run(run)
    return 0


async def serve(fleet: LocalFleet, ending: trio.Event) -> None:
    """Look after the machines, which needs nobody to ask: here the API is served, once there is one."""
    del fleet
    await ending.wait()
