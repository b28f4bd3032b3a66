"""How a machine ended: learnt from whoever may know, and written down where its process could not do so itself."""

from __future__ import annotations

import time
from collections.abc import Mapping

import msgspec
import structlog
import trio

from kvmd.errors import HostError
from kvmd.fleet.base import MachineEnd
from kvmd.fleet.entry import Entry
from kvmd.fleet.leftovers import outlives, remove_leftovers
from kvmd.fleet.looking import conversions_of_ended
from kvmd.fleet.units import Units
from kvmd.fleet.which_process import process_of
from kvmd.machine_process.counting import counted
from kvmd.machine_process.folder import END, EXIT, BadFile, EndFile, ExitFile, MachineFolder, ProcessFile
from kvmd.machine_process.kept_conversions import settle_conversions
from kvmd.machine_process.messages import CounterValues
from kvmd.machine_process.spawning import Reaped
from kvmd.machine_process.steps import Steps, read_steps
from kvmd.stop import ExitStatus, StopReason
from kvmd.units import format_size

PROCESS_DIED = "process-died"
OUT_OF_MEMORY = "out-of-memory"
"""The kernel ended the process, since it or the host was out of memory."""

_RESULTS = {
    "oom-kill": (OUT_OF_MEMORY, "the kernel ended its process for want of memory"),
    "watchdog": (PROCESS_DIED, "its process was ended by systemd, since its event loop stood still"),
}
"""What systemd says of ends that a signal alone does not tell (systemd.exec(5), SERVICE_RESULT)."""

_SIGNALLED = 128

_LAST_WORDS_SECONDS = 5.0
"""How long the parent of a process may take to say how it ended."""

_LOOK_SECONDS = 0.02

_log: structlog.stdlib.BoundLogger = structlog.get_logger("kvmd.fleet")


class Endings:
    """Sees the ends of machines whose processes live.

    Args:
        entries: of all machines, by name.
        units: asked how the processes ended that were in one.
    """

    def __init__(self, entries: Mapping[str, Entry], units: Units) -> None:
        self._entries = entries
        self._units = units
        self._reaped: dict[int, Reaped] = {}

    def note(self, reaped: Reaped) -> None:
        """Keep what the spawner says of a process that has ended, where it is a machine's."""
        if any(entry.info.pid == reaped.pid for entry in self._entries.values()):
            self._reaped[reaped.pid] = reaped

    async def see(self, entry: Entry) -> None:
        """Wait for a machine's end, however it comes, and note how that was."""
        await entry.wait_exit()
        pid = entry.info.pid
        exit_ = None if entry.killed else await self._how_it_ended(entry)
        if (entry.killed or exit_ is not None) and outlives(entry.info.spec):
            await remove_leftovers()
        conclude(entry, exit_)
        if pid is not None:
            self._reaped.pop(pid, None)

    async def _how_it_ended(self, entry: Entry) -> ExitFile | None:
        """Return how the process ended, where it has not written that down itself."""
        pid = entry.info.pid
        process = process_of(entry.folder)
        with trio.move_on_after(_LAST_WORDS_SECONDS):
            while True:
                try:
                    if entry.folder.read(END, EndFile) is not None:
                        return None
                    exit_ = entry.folder.read(EXIT, ExitFile)
                except BadFile:
                    return None
                if exit_ is not None:
                    return exit_
                if pid in self._reaped:
                    reaped = self._reaped[pid]
                    return ExitFile(pid, reaped.status, reaped.signal, time.time_ns())
                if process.unit and (told := await self._asked(process)) is not None:
                    return told
                # Its parent may be the spawner of an earlier daemon, which tells nobody but the folder.
                await trio.sleep(_LOOK_SECONDS)
        return None

    async def _asked(self, process: ProcessFile) -> ExitFile | None:
        try:
            return await self._units.end_of(process.unit, process.invocation)
        except HostError as error:
            _log.error("unit-not-asked", unit=process.unit, problem=str(error))
            return None


def conclude(entry: Entry, exit_: ExitFile | None = None) -> None:
    """Note how a machine ended, and write it down where its process could not.

    Args:
        entry: of a machine whose process is gone.
        exit_: how the process ended, where its parent told; else what it wrote down counts.
    """
    folder, name = entry.folder, entry.name
    end: EndFile | None = None
    try:
        end = folder.read(END, EndFile)
        if end is None and exit_ is None:
            exit_ = folder.read(EXIT, ExitFile)
    except BadFile as error:
        _log.error("machine-file-unusable", machine=name, problem=str(error))
    if end is None:
        end = msgspec.structs.replace(_violent_end(exit_, entry), counters=_counters_left(entry))
        _write_violent_end(folder, name, end)
    try:
        steps = read_steps(folder.fd)
    except OSError as error:
        _log.error("machine-file-unusable", machine=name, problem=str(error))
        steps = []
    if end.facts and not entry.info.facts:
        entry.info = msgspec.structs.replace(entry.info, facts=end.facts)
    entry.end(
        MachineEnd(end.reason, end.message, end.status, end.signal, end.wall_ns),
        counters=end.counters,
        steps=steps,
        started_ns=end.started_ns,
    )


def _violent_end(exit_: ExitFile | None, entry: Entry) -> EndFile:
    wall_ns = time.time_ns() if exit_ is None else exit_.wall_ns
    if entry.killed:
        return EndFile(StopReason.KILLED.value, "killed by the operator", ExitStatus.KILLED, 9, wall_ns)
    if exit_ is None or (exit_.signal is None and exit_.status is None):
        gone = "its process is gone, and nobody saw how it ended"
        return EndFile(PROCESS_DIED, gone, ExitStatus.INTERNAL, None, wall_ns)
    number, status = exit_.signal, exit_.status
    if number is not None:
        reason, message = PROCESS_DIED, f"its process was ended by signal {number}"
    else:
        reason, message = PROCESS_DIED, f"its process ended with status {status}, without a word"
    reason, message = _RESULTS.get(exit_.result, (reason, message))
    if reason == OUT_OF_MEMORY:
        most = entry.info.spec.limits.memory
        message += f": limits.memory is {format_size(most)}" if most is not None else ": the host's, it has no limit"
    return EndFile(reason, message, _SIGNALLED + number if number is not None else status or 0, number, wall_ns)


def _counters_left(entry: Entry) -> CounterValues | None:
    """Return what a machine that ended violently is known to have done."""
    try:
        left = settle_conversions(entry.folder)
    except (BadFile, OSError) as error:
        _log.error("machine-file-unusable", machine=entry.name, problem=str(error))
        left = conversions_of_ended(entry)
    return None if left is None else counted(left)


def _write_violent_end(folder: MachineFolder, name: str, end: EndFile) -> None:
    try:
        steps = Steps(folder.fd, _raise)
        try:
            if not steps.ended:
                steps.tell(
                    "stopped", "stopped", reason=end.reason, message=end.message, status=end.status, signal=end.signal
                )
        finally:
            steps.close()
        folder.write(END, end, durable=True)
    except OSError as error:
        _log.error("machine-file-not-written", machine=name, problem=str(error))


def _raise(error: OSError) -> None:
    raise error
