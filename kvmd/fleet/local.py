"""The machines of this host: each a process of its own, which outlives the daemon that made it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path

import structlog
import trio

from kvmd.errors import HostError, MachineExists, MachineSilent, MachineStateError, NoSuchDevice, UnknownMachine
from kvmd.fleet import looking
from kvmd.fleet.agent import MachineAgent
from kvmd.fleet.all_events import AllEvents, Newcomers
from kvmd.fleet.asking import ALIVE, ask
from kvmd.fleet.base import (
    Balloon,
    Console,
    Counters,
    Event,
    EventStream,
    MachineInfo,
    MachineState,
    MemoryMap,
    OutputPart,
    state_of,
)
from kvmd.fleet.creation import Creator
from kvmd.fleet.entry import Entry
from kvmd.fleet.following import MachineConsole, OutputFollower
from kvmd.fleet.leftovers import outlives, remove_leftovers
from kvmd.fleet.machine_events import MachineEvents
from kvmd.fleet.parent import Parent
from kvmd.fleet.places import never_an_id, parse_place, parse_places
from kvmd.fleet.recovery import conclude, process_of, recover
from kvmd.fleet.spawner_link import SPAWNER, SpawnerLink
from kvmd.fleet.state_folder import StateFolder
from kvmd.fleet.streams import PlacedStream
from kvmd.fleet.unit_pool import UnitPool
from kvmd.fleet.units import SystemdUnits, Units
from kvmd.machine_process.folder import (
    CONSOLE,
    END,
    EXIT,
    LOG,
    BadFile,
    EndFile,
    ExitFile,
    ProcessFile,
)
from kvmd.machine_process.lifecycle import Change
from kvmd.machine_process.messages import (
    AskPause,
    AskResume,
    AskStart,
    AskStop,
    PressPowerButton,
    Request,
    Status,
)
from kvmd.machine_process.spawning import Reaped
from kvmd.runnable import SHUTDOWN_SECONDS
from kvmd.spec import NAME_LIMIT, MachineSpec

_LAST_WORDS_SECONDS = 5.0
"""How long the parent of a process may take to say how it ended."""

_LOOK_SECONDS = 0.02

_log: structlog.stdlib.BoundLogger = structlog.get_logger("kvmd.fleet")


@asynccontextmanager
async def open_fleet(
    path: Path, *, spawner: Sequence[str] = SPAWNER, pool: UnitPool | None = None, units: Units | None = None
) -> AsyncIterator[LocalFleet]:
    """Take over the machines of a state folder, until the block ends; they go on without it.

    Args:
        path: the state folder, which is made where it is missing.
        spawner: the command of the machines' parent, where there is no ``pool``.
        pool: starts machines in units of their own.
        units: asked about machines that are in units, whoever starts new ones; by default systemd's.

    Raises:
        HostError: the folder cannot be used, or another daemon uses it.
    """
    state = StateFolder(path)
    with state.locked():
        state.sweep()
        entries: dict[str, Entry] = {}
        try:
            async with trio.open_nursery() as nursery:
                try:
                    fleet = LocalFleet(state, nursery, spawner, entries, pool, units or SystemdUnits())
                    await fleet.take_over()
                    yield fleet
                finally:
                    nursery.cancel_scope.cancel()
        finally:
            # Only now does nobody wait for their processes any more.
            for entry in entries.values():
                entry.close()


class LocalFleet:
    """All machines of a state folder: ``kvmd.fleet.base.Fleet``. Made by ``open_fleet``."""

    def __init__(
        self,
        state: StateFolder,
        nursery: trio.Nursery,
        spawner: Sequence[str],
        entries: dict[str, Entry],
        pool: UnitPool | None,
        units: Units,
    ) -> None:
        self._state = state
        self._nursery = nursery
        self._parent: Parent = SpawnerLink(spawner, self._note_reaped) if pool is None else pool
        self._units = units
        self._creator = Creator(state, self._parent)
        self._entries = entries
        self._reserved: set[str] = set()
        self._reaped: dict[int, Reaped] = {}
        self._newcomers = Newcomers()

    async def take_over(self) -> None:
        """Find the machines that are there, and be ready for new ones."""
        found = await recover(self._state, self._units)
        for entry in found:
            self._parent.adopt(process_of(entry.folder).unit)
        await self._nursery.start(self._parent.run)
        for entry in found:
            self._add(entry)
            if entry.ended:
                self._parent.release(process_of(entry.folder).unit)

    # -- all machines

    def machines(self) -> Sequence[MachineInfo]:
        """Return all of them, by name."""
        return [self._entries[name].info for name in sorted(self._entries)]

    def machine(self, name: str) -> MachineInfo:
        """Return one."""
        return self._entry(name).info

    async def create(
        self, spec: MachineSpec, *, owner_uid: int, files: Sequence[int] = (), any_name: bool = False
    ) -> MachineInfo:
        """Make a machine's process, with memory and vCPUs, not running yet."""
        name = self._free_name(spec.name, any_name=any_name)
        self._reserved.add(name)
        try:
            entry = await self._creator.create(spec.with_overrides(name=name), owner_uid=owner_uid, files=files)
        finally:
            self._reserved.discard(name)
        self._add(entry)
        self._newcomers.tell(entry)
        _log.info("machine-created", machine=name, pid=entry.info.pid)
        return entry.info

    async def delete(self, name: str) -> None:
        """Forget a machine that is created or stopped; a created one's process is ended."""
        entry = self._entry(name)
        async with entry.turn:
            if entry.deleted:
                raise UnknownMachine(f"machine {name} was deleted")
            if entry.info.state not in {"created", "stopped"}:
                raise MachineStateError("delete", needed="created or stopped", found=entry.info.state)
            if not entry.ended:
                entry.killed = True
                entry.kill()
                await entry.wait(lambda: entry.ended)
            try:
                self._state.remove(name)
            except OSError as error:
                # It is out of the way already, and swept the next time.
                _log.warning("machine-folder-not-removed", machine=name, problem=str(error))
            del self._entries[name]
            entry.forget()
        _log.info("machine-deleted", machine=name)

    async def stop_all(self, seconds: float, *, hurry: trio.Event | None = None) -> None:
        """Stop all machines, and kill those that have not stopped within ``seconds``; those not started are killed.

        Guests that have a power button are asked by it first, and stopped when they have not shut down within
        ``SHUTDOWN_SECONDS``.

        Args:
            seconds: how long a machine that is stopped may take; 0: all of them are killed at once.
            hurry: once it is set, no guest is waited for to shut down.
        """
        hurry = trio.Event() if hurry is None else hurry
        async with trio.open_nursery() as nursery:
            for entry in self._entries.values():
                if not entry.ended:
                    nursery.start_soon(self._stop_or_kill, entry, seconds, hurry)

    # -- what one machine does

    async def start(self, name: str) -> MachineInfo:
        """Run a created machine."""
        return await self._change(name, "start", AskStart(), needed="created", change="started")

    async def pause(self, name: str) -> MachineInfo:
        """Take a running machine's vCPUs out of the guest."""
        return await self._change(name, "pause", AskPause(), needed="running", change="paused")

    async def resume(self, name: str) -> MachineInfo:
        """Let a paused machine's vCPUs in again."""
        return await self._change(name, "resume", AskResume(), needed="paused", change="resumed")

    async def stop(self, name: str) -> MachineInfo:
        """Ask a running or paused machine to stop, and wait until it has."""
        entry = self._entry(name)
        if entry.ended:
            raise MachineStateError("stop", needed="running or paused", found="stopped")
        try:
            await ask(entry, "stop", AskStop(), Status)
        except MachineStateError as error:
            # "stopped" means here: somebody else was first, and its process is about to end.
            if error.found != "stopped":
                raise
        await entry.wait(lambda: entry.ended)
        return entry.info

    async def press_power_button(self, name: str) -> MachineInfo:
        """Ask a running machine's guest to shut down."""
        entry = self._entry(name)
        await ask(entry, "press the power button", PressPowerButton(), Status, needed="running")
        return entry.info

    async def balloon(self, name: str) -> Balloon:
        """Return what memory a guest does without."""
        return await looking.balloon(self._entry(name))

    async def set_balloon(self, name: str, target_bytes: int) -> Balloon:
        """Ask a guest to do without so much memory."""
        return await looking.balloon(self._entry(name), target_bytes)

    async def kill(self, name: str) -> MachineInfo:
        """End a machine's process at once, whatever state it is in but stopped."""
        entry = self._entry(name)
        if entry.ended:
            raise MachineStateError("kill", needed=ALIVE, found="stopped")
        entry.killed = True
        entry.kill()
        await entry.wait(lambda: entry.ended)
        return entry.info

    async def wait(self, name: str, states: frozenset[MachineState]) -> MachineInfo:
        """Wait until the machine is in one of the states. The caller sets the deadline."""
        entry = self._entry(name)
        await entry.wait(lambda: entry.info.state in states)
        if entry.info.state not in states:
            raise UnknownMachine(f"machine {name} was deleted")
        return entry.info

    # -- looking into one

    async def counters(self, name: str) -> Counters:
        """Return what the machine did so far; of one that ended without a word, nothing."""
        return await looking.counters(self._entry(name))

    async def memory_map(self, name: str) -> MemoryMap:
        """Return the state of all memory."""
        return await looking.memory_map(self._entry(name))

    async def read_memory(self, name: str, gpa: int, size_bytes: int) -> bytes:
        """Return shared memory. Raises PrivateMemory where a page of it is private, ValueError outside memory."""
        return await looking.read_memory(self._entry(name), gpa, size_bytes)

    async def conversions(self, name: str, *, since: int, limit: int) -> Sequence[dict[str, object]]:
        """Return the recent conversions with a sequence above ``since``, oldest first, at most ``limit``."""
        return await looking.conversions(self._entry(name), since=since, limit=limit)

    async def last_conversion(self, name: str) -> int:
        """Return the sequence of the last conversion; 0 where there was none."""
        return await looking.last_conversion(self._entry(name))

    @asynccontextmanager
    async def events(self, name: str | None, *, last_id: str | None) -> AsyncIterator[EventStream]:
        """Stream what happens to one machine, or to all."""
        if name is None:
            places = None if last_id is None else parse_places(last_id)
            async with AllEvents(self._entries.values(), places).follow(self._newcomers) as stream:
                yield stream
            return
        followed = MachineEvents(self._entry(name), None if last_id is None else parse_place(last_id))
        try:
            await followed.open()
            if followed.ahead:
                raise never_an_id(str(last_id), "this machine's")
            yield _as_events(followed, name)
        finally:
            await followed.aclose()

    @asynccontextmanager
    async def console(self, name: str) -> AsyncIterator[Console]:
        """Attach to a machine's console: what it printed lately comes first."""
        console = MachineConsole(self._entry(name))
        try:
            await trio.lowlevel.checkpoint()
            yield console
        finally:
            await console.aclose()

    @asynccontextmanager
    async def agent(self, name: str) -> AsyncIterator[Console]:
        """Talk to the program in a machine's guest that has its port."""
        agent = MachineAgent(self._entry(name))
        try:
            await agent.attach()
            yield agent
        finally:
            await agent.aclose()

    def console_output(
        self, name: str, *, start: int = 0, follow: bool = True
    ) -> AbstractAsyncContextManager[AsyncIterator[OutputPart]]:
        """Read what a machine prints."""
        return _follow(lambda: OutputFollower(self._entry(name), CONSOLE, start=start, follow=follow))

    def log_output(
        self, name: str, *, start: int = 0, follow: bool = True
    ) -> AbstractAsyncContextManager[AsyncIterator[OutputPart]]:
        """Read what a machine's process logs, as lines of JSON."""
        return _follow(lambda: OutputFollower(self._entry(name), LOG, start=start, follow=follow))

    # -- inside

    def _entry(self, name: str) -> Entry:
        try:
            return self._entries[name]
        except KeyError:
            raise UnknownMachine(f"there is no machine {name}") from None

    def _free_name(self, name: str, *, any_name: bool) -> str:
        wanted, number = name, 1
        while name in self._entries or name in self._reserved:
            if not any_name:
                raise MachineExists(f"there is a machine {name} already")
            number += 1
            name = f"{wanted[: NAME_LIMIT - len(str(number)) - 1]}-{number}"
        return name

    def _add(self, entry: Entry) -> None:
        self._entries[entry.name] = entry
        if not entry.ended:
            self._nursery.start_soon(self._watch, entry)

    async def _watch(self, entry: Entry) -> None:
        """See the machine's end, however it comes."""
        await entry.wait_exit()
        pid = entry.info.pid
        exit_ = None if entry.killed else await self._how_it_ended(entry)
        if (entry.killed or exit_ is not None) and outlives(entry.info.spec):
            await remove_leftovers()
        conclude(entry, exit_)
        self._parent.release(process_of(entry.folder).unit)
        if pid is not None:
            self._reaped.pop(pid, None)
        end = entry.info.end
        if end is not None:
            (_log.warning if end.signal is not None and not entry.killed else _log.info)(
                "machine-stopped", machine=entry.name, reason=end.reason, message=end.message, status=end.status
            )

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

    def _note_reaped(self, reaped: Reaped) -> None:
        if any(entry.info.pid == reaped.pid for entry in self._entries.values()):
            self._reaped[reaped.pid] = reaped

    async def _change(self, name: str, action: str, request: Request, *, needed: str, change: Change) -> MachineInfo:
        entry = self._entry(name)
        async with entry.turn:
            asked_ns = time.time_ns()
            try:
                status = await ask(entry, action, request, Status, needed=needed)
            except MachineStateError:
                # Perhaps it did, and ended before it could say so.
                done = entry.ended and any(
                    step.change == change and step.wall_ns >= asked_ns for step in reversed(entry.steps)
                )
                if not done:
                    raise
            else:
                entry.change(state_of(status.state), started_ns=status.started_ns)
            return entry.info

    async def _stop_or_kill(self, entry: Entry, seconds: float, hurry: trio.Event) -> None:
        if seconds and entry.info.spec.kernel is not None and entry.info.state == "running":
            await self._shut_down(entry, hurry)
        with trio.move_on_after(seconds):
            with suppress(MachineStateError, MachineSilent, UnknownMachine):
                await self.stop(entry.name)
        if not entry.ended:
            entry.killed = True
            entry.kill()
            await entry.wait(lambda: entry.ended)

    async def _shut_down(self, entry: Entry, hurry: trio.Event) -> None:
        """Press a guest's power button, and wait until it has shut down, or need not be waited for any more."""
        async with trio.open_nursery() as nursery:

            async def need_not_wait() -> None:
                await hurry.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(need_not_wait)
            nursery.cancel_scope.deadline = trio.current_time() + SHUTDOWN_SECONDS
            with suppress(NoSuchDevice, MachineStateError, MachineSilent, UnknownMachine):
                await self.press_power_button(entry.name)
                _log.info("machine-shutting-down", machine=entry.name, seconds=SHUTDOWN_SECONDS)
                await entry.wait(lambda: entry.ended)
            nursery.cancel_scope.cancel()
        if not entry.ended:
            _log.warning("machine-not-shut-down", machine=entry.name, consequence="it is stopped")


def _as_events(followed: MachineEvents, name: str) -> EventStream:
    async def following() -> Event | None:
        happened = await followed.next()
        if happened is None:
            return None
        return Event(id=str(happened.place), kind=happened.kind, machine=name, data=happened.data)

    return PlacedStream(following, lambda: None if followed.place is None else str(followed.place))


@asynccontextmanager
async def _follow(make: Callable[[], OutputFollower]) -> AsyncIterator[AsyncIterator[OutputPart]]:
    follower = make()
    try:
        await trio.lowlevel.checkpoint()
        yield follower.stream()
    finally:
        await follower.aclose()
