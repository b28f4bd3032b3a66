"""Finding the machines of an earlier daemon again: those that run, those that ended meanwhile, and what is neither."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import msgspec
import structlog
import trio

from kvmd.errors import KvmdError
from kvmd.fleet.base import MachineInfo, state_of
from kvmd.fleet.ending import conclude
from kvmd.fleet.entry import Entry
from kvmd.fleet.state_folder import StateFolder
from kvmd.fleet.units import Units
from kvmd.fleet.which_process import open_pidfd, process_of
from kvmd.machine_process.client import ControlClient, HungUp
from kvmd.machine_process.folder import (
    END,
    EXIT,
    MACHINE,
    BadFile,
    EndFile,
    ExitFile,
    MachineFile,
    MachineFolder,
    boot_id,
)
from kvmd.machine_process.framing import BadMessage
from kvmd.machine_process.messages import AskInfo, Greeting, Info
from kvmd.spec.machine import NAME_PATTERN

ANSWER_SECONDS = 5.0
"""How long a machine may take to answer a new daemon."""

_log: structlog.stdlib.BoundLogger = structlog.get_logger("kvmd.fleet")


async def recover(state: StateFolder, units: Units) -> list[Entry]:
    """Return what the state folder knows: entries of processes that live, and of machines that have ended.

    Whatever else is in the folder is named in the log; nothing in it makes this fail.

    Args:
        state: the folder.
        units: asked how the processes ended that were in one.
    """
    found: list[Entry] = []

    async def recover_one(path: Path) -> None:
        try:
            entry = await _recover(state, path, units)
        except (KvmdError, OSError) as error:
            _log.error("machine-not-recovered", machine=path.name, problem=str(error))
        else:
            if entry is not None:
                found.append(entry)

    async with trio.open_nursery() as nursery:
        for path in sorted(state.machines.iterdir()):
            nursery.start_soon(recover_one, path)
    return found


async def _recover(state: StateFolder, path: Path, units: Units) -> Entry | None:
    try:
        folder = _open_folder(path)
    except NotADirectoryError:
        _log.warning("stranger-in-state-folder", path=str(path), consequence="left alone")
        return None
    try:
        entry = await _recover_folder(folder, path.name, units)
    except BaseException:
        folder.close()
        raise
    if entry is None:
        folder.close()
        aside = state.set_aside(path.name)
        _log.error("machine-folder-unusable", machine=path.name, moved_to=str(aside))
    return entry


def _open_folder(path: Path) -> MachineFolder:
    """Open what may be a machine's folder. Raises NotADirectoryError where it cannot be one, a link for example."""
    if re.fullmatch(NAME_PATTERN, path.name, re.ASCII) is None:
        raise NotADirectoryError(path)
    return MachineFolder.open(path)


async def _recover_folder(folder: MachineFolder, name: str, units: Units) -> Entry | None:
    """Return the entry of a folder, or None where it is no machine's."""
    about: MachineFile | None = None
    try:
        about = folder.read(MACHINE, MachineFile)
        if about is None:
            _log.warning("machine-file-missing", machine=name, file=MACHINE, consequence="it was never finished")
        elif about.spec.name != name:
            _log.error("machine-file-unusable", machine=name, problem=f"{MACHINE} is of {about.spec.name}")
            about = None
    except BadFile as error:
        _log.error("machine-file-unusable", machine=name, problem=str(error))
    greeting, info = await _ask(folder, name)
    pidfd = _pidfd(folder, greeting)
    if pidfd is not None and about is None and info is not None:
        # It lives, and knows itself what it is; only whose it is, nobody knows any more.
        about = MachineFile(info.spec, os.getuid(), time.time_ns())
        folder.write(MACHINE, about)
    if about is None:
        if pidfd is not None:
            os.close(pidfd)
            raise BadFile(f"{name} runs, but neither its files nor its process say what it is: end it by hand")
        return None
    machine = MachineInfo(
        name=name,
        spec=about.spec,
        state="created",
        owner_uid=about.owner_uid,
        created_ns=about.created_ns,
        started_ns=None if info is None else info.started_ns,
        pid=None,
        facts={} if info is None else info.facts,
        end=None,
    )
    if pidfd is None:
        entry = Entry(machine, folder, -1)
        conclude(entry, await _unit_exit(folder, units))
        _log.info("machine-had-ended", machine=name, reason=entry.info.end.reason if entry.info.end else "")
        return entry
    pid = greeting.pid if greeting is not None else process_of(folder).pid
    # One that does not answer may do anything: "running" lets the operator stop and kill it.
    state = "running" if info is None else state_of(info.state)
    entry = Entry(msgspec.structs.replace(machine, state=state, pid=pid), folder, pidfd)
    _log.info("machine-found", machine=name, pid=pid, state=state)
    return entry


async def _ask(folder: MachineFolder, name: str) -> tuple[Greeting | None, Info | None]:
    greeting: Greeting | None = None
    try:
        with trio.fail_after(ANSWER_SECONDS):
            async with await ControlClient.connect(folder) as client:
                greeting = client.greeting
                return greeting, await client.ask(AskInfo(), Info)
    except HungUp:
        pass  # it is gone
    except trio.TooSlowError:
        _log.error("machine-silent", machine=name, seconds=ANSWER_SECONDS)
    except BadMessage as error:
        _log.error("machine-speaks-otherwise", machine=name, problem=str(error))
    return greeting, None


async def _unit_exit(folder: MachineFolder, units: Units) -> ExitFile | None:
    """Return how a process ended that was in a unit, where nobody has written that down yet."""
    process = process_of(folder)
    if not process.unit or process.boot_id != boot_id():
        return None
    try:
        if folder.read(END, EndFile) is None and folder.read(EXIT, ExitFile) is None:
            return await units.end_of(process.unit, process.invocation)
    except KvmdError as error:
        _log.warning("unit-not-asked", unit=process.unit, problem=str(error))
    return None


def _pidfd(folder: MachineFolder, greeting: Greeting | None) -> int | None:
    """Return a descriptor of the machine's process, or None where it is gone."""
    if greeting is not None:
        return open_pidfd(greeting.pid, greeting.start_ticks)
    process = process_of(folder)
    if process.pid <= 0 or process.boot_id != boot_id():
        return None
    return open_pidfd(process.pid, process.start_ticks)
