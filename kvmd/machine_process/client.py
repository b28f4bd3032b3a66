"""The other side of a machine's control socket."""

from __future__ import annotations

import errno
from types import TracebackType
from typing import Self, TypeVar

import msgspec
import trio

from kvmd.errors import DeviceInUse, KvmdError, MachineStateError, NoSuchDevice
from kvmd.machine_process.folder import MachineFolder, decode_hook
from kvmd.machine_process.framing import BadMessage, Framed
from kvmd.machine_process.messages import ANSWER_LIMIT, PROTOCOL, Answer, Greeting, Refused, Request
from kvmd.memory.accessor import PrivateMemory

_RETRY_SECONDS = 0.01

T = TypeVar("T")


class HungUp(KvmdError):
    """The machine's process is not there any more, or closed the connection."""


class NoRoom(HungUp):
    """The machine closed the connection before its first word: it has too many clients, or is about to end."""


class ControlClient:
    """One connection: made by ``connect``, used by one task at a time.

    Attributes:
        greeting: the machine's first words.
    """

    def __init__(self, stream: trio.SocketStream, framed: Framed[Answer], greeting: Greeting) -> None:
        self._stream = stream
        self._framed = framed
        self.greeting = greeting

    @classmethod
    async def connect(cls, folder: MachineFolder) -> Self:
        """Connect to the machine of a folder.

        Raises:
            HungUp: nobody listens there.
            NoRoom: somebody does, who has no room for one more client.
            BadMessage: what answers is no machine, or one of another protocol.
        """
        stream = await _open_stream(folder)
        try:
            framed = Framed(stream, msgspec.msgpack.Decoder(Answer, dec_hook=decode_hook), ANSWER_LIMIT)
            return cls(stream, framed, await _greeted(framed))
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise

    async def ask(self, request: Request, kind: type[T]) -> T:
        """Ask, and return the answer, which is of ``kind``.

        Raises:
            HungUp: the machine's process ended before it answered.
            MachineStateError, PrivateMemory, NoSuchDevice, DeviceInUse: as the machine says.
            ValueError: not within memory.
            BadMessage: the answer is something else.
        """
        await self.send(request)
        answer = await self.receive()
        if answer is None:
            raise HungUp("the machine's process ended")
        if isinstance(answer, Refused):
            raise _error(answer)
        if not isinstance(answer, kind):
            raise BadMessage(f"expected {kind.__name__}, not {answer!r:.100}")
        return answer

    async def send(self, request: Request) -> None:
        """Send a request that has many answers.

        Raises:
            HungUp: the machine's process ended.
        """
        try:
            await self._framed.send(request)
        except trio.BrokenResourceError as error:
            raise HungUp("the machine's process ended") from error

    async def receive(self) -> Answer | None:
        """Return the next answer, or None at the end of the machine's process.

        Raises:
            BadMessage: it is none.
        """
        try:
            return await self._framed.receive()
        except trio.BrokenResourceError:
            return None

    async def aclose(self) -> None:
        """Hang up; at once, even when it is cancelled."""
        await trio.aclose_forcefully(self._stream)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


async def _greeted(framed: Framed[Answer]) -> Greeting:
    try:
        greeting = await framed.receive()
    except trio.BrokenResourceError as error:
        raise HungUp("the machine's process ended") from error
    if greeting is None:
        raise NoRoom("the machine's process has too many clients, or is about to end")
    if not isinstance(greeting, Greeting) or greeting.protocol != PROTOCOL:
        raise BadMessage(f"speaks another protocol than {PROTOCOL}: {greeting!r:.100}")
    return greeting


async def _open_stream(folder: MachineFolder) -> trio.SocketStream:
    while True:
        try:
            return await trio.open_unix_socket(folder.control)
        except OSError as error:
            # unix(7): a socket that does not block says so where the queue of those who wait is full.
            if error.errno != errno.EAGAIN:
                raise HungUp(f"nobody listens at the machine's control socket: {error.strerror}") from error
            await trio.sleep(_RETRY_SECONDS)


def _error(refused: Refused) -> Exception:
    match refused.kind:
        case "state":
            return MachineStateError(refused.action, needed=refused.needed, found=refused.found)
        case "private":
            return PrivateMemory(refused.gpa)
        case "range":
            return ValueError(refused.message)
        case "no-device":
            return NoSuchDevice(refused.message)
        case "in-use":
            return DeviceInUse(refused.message)
        case _:
            return BadMessage(refused.message)
