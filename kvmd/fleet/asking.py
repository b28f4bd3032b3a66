"""One question to a machine's process, and the errors that the fleet makes of what goes wrong."""

from __future__ import annotations

from typing import TypeVar

import trio

from kvmd.errors import MachineSilent, MachineStateError
from kvmd.fleet.entry import Entry
from kvmd.machine_process.client import ControlClient, HungUp, NoRoom
from kvmd.machine_process.framing import BadMessage
from kvmd.machine_process.messages import Request

REQUEST_SECONDS = 15.0
"""How long a machine may take to do what it is asked: a pause waits up to 5 seconds for its vCPUs."""

END_SECONDS = 5.0
"""How long a process may take to end after it closed its control socket."""

_ROOM_SECONDS = 0.02
"""Before a machine that had no room for one more client is asked again."""

ALIVE = "created, running or paused"

T = TypeVar("T")


async def ask(entry: Entry, action: str, request: Request, kind: type[T], *, needed: str = ALIVE) -> T:
    """Ask a machine's process.

    Raises:
        MachineStateError: it says so, or it has ended.
        MachineSilent: it does not answer.
    """
    try:
        with trio.fail_after(REQUEST_SECONDS):
            if entry.ended:
                raise HungUp("it has ended")  # noqa: TRY301 - like one that ends meanwhile
            async with await connect(entry) as client:
                return await client.ask(request, kind)
    except HungUp as error:
        with trio.move_on_after(END_SECONDS):
            await entry.wait(lambda: entry.ended)
        if entry.ended:
            raise MachineStateError(action, needed=needed, found="stopped") from error
        raise MachineSilent(f"machine {entry.name} closes its control socket, but goes on: kill it") from error
    except trio.TooSlowError as error:
        raise MachineSilent(
            f"machine {entry.name} did not answer within {REQUEST_SECONDS:.0f} s: kill it, or try again"
        ) from error
    except BadMessage as error:
        raise MachineSilent(f"machine {entry.name} gives no sensible answer: {error}") from error


async def connect(entry: Entry) -> ControlClient:
    """Connect to a machine's process, once it has room for one more client.

    Raises:
        HungUp, BadMessage: as ``ControlClient.connect``.
    """
    while True:
        try:
            return await ControlClient.connect(entry.folder)
        except NoRoom:
            await trio.sleep(_ROOM_SECONDS)
