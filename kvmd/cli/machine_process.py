"""``kvmd machine-process``: one machine of the daemon's, started by a service manager instead of the daemon."""

from __future__ import annotations

import errno
import os
import socket
from contextlib import ExitStack
from pathlib import Path

import click

from kvmd.errors import ConfigError
from kvmd.machine import Machine
from kvmd.machine_process.folder import CONTROL, MachineFolder, listen_in
from kvmd.machine_process.process import Inheritance, live


@click.command("machine-process", epilog="Exit status: the machine's, as `kvmd run --help` lists them.")
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
def machine_process(folder: Path) -> int:
    """Be the process of the machine that FOLDER/machine.json describes.

    It waits to be started over FOLDER/control, as docs/daemon.md says, and keeps its console, its log and how it ended
    in FOLDER.
    """
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
