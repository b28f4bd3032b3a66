"""A connection to the program in a guest that has its port."""

from __future__ import annotations

from contextlib import suppress

import trio

from kvmd.errors import MachineSilent, MachineStateError
from kvmd.fleet.asking import ALIVE, REQUEST_SECONDS
from kvmd.fleet.entry import Entry
from kvmd.machine_process.client import ControlClient, HungUp
from kvmd.machine_process.framing import BadMessage
from kvmd.machine_process.messages import AGENT_PIECE, AgentSaid, AgentTold, AttachAgent, Attached, TellAgent


class MachineAgent:
    """Bytes to and from the agent: ``kvmd.fleet.base.Console``. One task receives while another one may send.

    Args:
        entry: the machine.
    """

    def __init__(self, entry: Entry) -> None:
        self._entry = entry
        self._client: ControlClient | None = None
        self._told = trio.Event()
        self._over = False

    async def attach(self) -> None:
        """Connect.

        Raises:
            NoSuchDevice: the machine has no port for an agent.
            DeviceInUse: somebody else talks to it.
            MachineStateError: the machine has ended.
            MachineSilent: it does not answer.
        """
        if self._entry.ended:
            raise self._ended()
        try:
            with trio.fail_after(REQUEST_SECONDS):
                self._client = await ControlClient.connect(self._entry.folder)
                await self._client.ask(AttachAgent(), Attached)
        except HungUp as error:
            raise self._ended() from error
        except (trio.TooSlowError, BadMessage) as error:
            raise MachineSilent(f"machine {self._entry.name} gives no sensible answer: {error}") from error

    async def receive(self) -> bytes:
        """Return what the agent says next; empty at the machine's end."""
        answer = None
        while self._client is not None:
            with suppress(BadMessage):
                answer = await self._client.receive()
            if not isinstance(answer, AgentTold):
                break
            self._told.set()
        if isinstance(answer, AgentSaid):
            return answer.data
        self._over = True
        self._told.set()
        return b""

    async def send(self, data: bytes) -> None:
        """Send to the agent; waits while it does not take it, while somebody else calls ``receive``.

        Raises:
            MachineStateError: the machine has ended.
        """
        for at in range(0, len(data), AGENT_PIECE):
            self._told = trio.Event()
            if self._over or self._client is None:
                raise self._ended()
            try:
                await self._client.send(TellAgent(data[at : at + AGENT_PIECE]))
            except HungUp as error:
                raise self._ended() from error
            await self._told.wait()

    async def aclose(self) -> None:
        """Hang up."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    def _ended(self) -> MachineStateError:
        return MachineStateError("talk to the agent", needed=ALIVE, found="stopped")
