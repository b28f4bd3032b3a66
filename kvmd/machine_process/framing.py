"""Messages on a stream: a length of 4 bytes and MessagePack, with a limit for what the other side may send."""

from __future__ import annotations

from typing import Generic, TypeVar

import msgspec
import trio

from kvmd.errors import KvmdError
from kvmd.machine_process.messages import encode_hook

_LENGTH = 4
_READ_BYTES = 65536

T = TypeVar("T")


class BadMessage(KvmdError):
    """The other side sent something that is no message."""


class Framed(Generic[T]):
    """One side of a control connection.

    Args:
        stream: closed by its owner.
        decoder: for what the other side sends.
        limit: bytes of a message that is received, at most.
    """

    def __init__(self, stream: trio.abc.HalfCloseableStream, decoder: msgspec.msgpack.Decoder[T], limit: int) -> None:
        self._stream = stream
        self._decoder = decoder
        self._limit = limit
        self._encoder = msgspec.msgpack.Encoder(enc_hook=encode_hook)
        self._received = bytearray()

    async def send(self, message: object) -> None:
        """Send one message, waiting for as long as the other side takes to read.

        Raises:
            trio.BrokenResourceError: the other side has hung up.
        """
        data = bytearray(_LENGTH)
        self._encoder.encode_into(message, data, _LENGTH)
        data[:_LENGTH] = (len(data) - _LENGTH).to_bytes(_LENGTH, "big")
        await self._stream.send_all(data)

    async def receive(self) -> T | None:
        """Return the next message, or None where the other side hung up, perhaps in the middle of one.

        Raises:
            BadMessage: it is too long, or none.
            trio.BrokenResourceError: the connection broke.
        """
        if not await self._fill(_LENGTH):
            return None
        size_bytes = int.from_bytes(self._received[:_LENGTH], "big")
        if size_bytes > self._limit:
            raise BadMessage(f"a message of {size_bytes} bytes: at most {self._limit} are taken")
        if not await self._fill(_LENGTH + size_bytes):
            return None
        data = bytes(self._received[_LENGTH : _LENGTH + size_bytes])
        del self._received[: _LENGTH + size_bytes]
        try:
            return self._decoder.decode(data)
        except (msgspec.DecodeError, RecursionError, ValueError) as error:
            raise BadMessage(f"not a message of this protocol: {error}") from error

    async def _fill(self, size_bytes: int) -> bool:
        while len(self._received) < size_bytes:
            data = await self._stream.receive_some(_READ_BYTES)
            if not data:
                return False
            self._received += data
        return True
