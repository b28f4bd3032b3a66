"""How a machine is stopped: its guest asked by the power button, its process asked, its process ended."""

from __future__ import annotations

from contextlib import suppress

import structlog
import trio

from kvmd.errors import MachineSilent, MachineStateError, NoSuchDevice
from kvmd.fleet.asking import ask
from kvmd.fleet.entry import Entry
from kvmd.machine_process.messages import AskStop, PressPowerButton, Status
from kvmd.runnable import SHUTDOWN_SECONDS

_log: structlog.stdlib.BoundLogger = structlog.get_logger("kvmd.fleet")


async def press_power_button(entry: Entry) -> None:
    """Ask a running machine's guest to shut down."""
    await ask(entry, "press the power button", PressPowerButton(), Status, needed="running")


async def stop(entry: Entry) -> None:
    """Ask a running or paused machine to stop, and wait until it has."""
    if entry.ended:
        raise MachineStateError("stop", needed="running or paused", found="stopped")
    try:
        await ask(entry, "stop", AskStop(), Status)
    except MachineStateError as error:
        # "stopped" means here: somebody else was first, and its process is about to end.
        if error.found != "stopped":
            raise
    await entry.wait(lambda: entry.ended)


async def kill(entry: Entry) -> None:
    """End a machine's process at once, and wait until it is gone."""
    entry.killed = True
    entry.kill()
    await entry.wait(lambda: entry.ended)


async def stop_or_kill(entry: Entry, seconds: float, hurry: trio.Event) -> None:
    """Stop a machine, and kill it where it has not stopped within ``seconds``, or was not started.

    A guest that has a power button is asked by it first, and stopped when it has not shut down within
    ``SHUTDOWN_SECONDS``.

    Args:
        entry: the machine's.
        seconds: how long it may take; 0: it is killed at once.
        hurry: once it is set, the guest is not waited for to shut down.
    """
    if seconds and entry.info.spec.kernel is not None and entry.info.state == "running":
        await _shut_down(entry, hurry)
    with trio.move_on_after(seconds):
        with suppress(MachineStateError, MachineSilent):
            await stop(entry)
    if not entry.ended:
        await kill(entry)


async def _shut_down(entry: Entry, hurry: trio.Event) -> None:
    """Press a guest's power button, and wait until it has shut down, or need not be waited for any more."""
    async with trio.open_nursery() as nursery:

        async def need_not_wait() -> None:
            await hurry.wait()
            nursery.cancel_scope.cancel()

        nursery.start_soon(need_not_wait)
        nursery.cancel_scope.deadline = trio.current_time() + SHUTDOWN_SECONDS
        with suppress(NoSuchDevice, MachineStateError, MachineSilent):
            await press_power_button(entry)
            _log.info("machine-shutting-down", machine=entry.name, seconds=SHUTDOWN_SECONDS)
            await entry.wait(lambda: entry.ended)
        nursery.cancel_scope.cancel()
    if not entry.ended:
        _log.warning("machine-not-shut-down", machine=entry.name, consequence="it is stopped")
