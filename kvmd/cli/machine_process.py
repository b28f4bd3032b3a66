"""``kvmd machine-process``: one machine of the daemon's, started by a service manager instead of the daemon."""

from __future__ import annotations

import errno
import os
import socket
from contextlib import ExitStack
from pathlib import Path

import click

from kvmd.errors import ConfigError
from kvmd.journal import is_stderr
from kvmd.machine import Machine
from kvmd.machine_process.folder import CONTROL, MachineFolder, listen_in
from kvmd.machine_process.process import Inheritance, live
from kvmd.machine_process.waiting import wait_to_become
from kvmd.service_manager import ServiceManager


@click.command("machine-process", epilog="Exit status: the machine's, as `kvmd run --help` lists them.")
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False), required=False)
@click.option(
    "--wait-at",
    type=click.Path(path_type=Path),
    help="Become the machine that the daemon which listens at this socket says; exit with 0 where its end is written.",
)
def machine_process(folder: Path | None, wait_at: Path | None) -> int:
    """Be the process of the machine that FOLDER/machine.json describes.

    It waits to be started over FOLDER/control, as docs/daemon.md says, and keeps its console, its log and how it ended
    in FOLDER.
    """
    if (folder is None) == (wait_at is None):
        raise click.UsageError("name either the machine's FOLDER, or where to wait for one (--wait-at)")
    if folder is not None:
        return _live_in(folder)
    assert wait_at is not None  # noqa: S101 - for the type checker: see above
    manager = ServiceManager.of_this_process()
    try:
        return wait_to_become(wait_at, Machine.open, manager, journal=is_stderr(os.environ))
    finally:
        manager.close()


def _live_in(folder: Path) -> int:
    with ExitStack() as stack:
        opened = stack.enter_context(MachineFolder.open(folder))
        listening = _listen(opened, folder)
        inherited = Inheritance(os.dup(opened.fd), listening.detach(), None, ())
    return live(inherited, Machine.open)


def _listen(opened: MachineFolder, folder: Path) -> socket.socket:
    try:
        try:
            return listen_in(opened)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or _is_answered(opened):
                raise
            os.unlink(CONTROL, dir_fd=opened.fd)
            return listen_in(opened)
    except OSError as error:
        problem = "another process is that machine" if error.errno == errno.EADDRINUSE else error.strerror
        raise ConfigError(f"cannot listen at {folder / CONTROL}: {problem}") from error


def _is_answered(opened: MachineFolder) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        return client.connect_ex(opened.control) == 0
