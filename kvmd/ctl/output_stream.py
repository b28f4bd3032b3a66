"""What a machine prints or logs: bytes that begin as far back as kvmd keeps them, and end with the machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from kvmd.ctl.client import Client
from kvmd.ctl.errors import CutOff, Unreachable
from kvmd.ctl.following import Patience, has_ended
from kvmd.ctl.wire import Idle

KEPT_SECONDS = 0.5
"""What is kept comes at once: after so long without more, all of it was there."""

LINE_LIMIT = 1 << 20


def kept_output(client: Client, target: str) -> Iterator[bytes]:
    """Yield what is kept, and not what comes later."""

    def over() -> None:
        raise _AllThere

    try:
        with client.stream(target, silence_seconds=None, idle=Idle(KEPT_SECONDS, over)) as stream:
            while data := stream.read():
                yield data
    except _AllThere:
        return


def follow_output(
    client: Client, machine: str, target: str, patience: Patience, *, kept: Callable[[], None] | None = None
) -> Iterator[bytes]:
    """Yield what is kept and what comes, up to the machine's end.

    A connection that is lost is made again. The stream then begins again too: as many bytes as were seen are skipped,
    which is right as long as kvmd keeps all that the machine has printed.

    Args:
        client: asks the daemon.
        machine: its name.
        target: the stream.
        patience: for lost connections.
        kept: called when what is kept has come.
    """
    seen = 0
    connected = False
    idle = None if kept is None else Idle(KEPT_SECONDS, kept)
    while True:
        skip = seen
        try:
            # There are no keep-alives here: a machine may print nothing for days.
            with client.stream(target, silence_seconds=None, idle=idle) as stream:
                patience.connected()
                connected, idle = True, None
                while data := stream.read():
                    fresh = data[skip:]
                    skip = max(0, skip - len(data))
                    seen += len(fresh)
                    if fresh:
                        yield fresh
        except (CutOff, Unreachable) as error:
            if not connected:
                raise
            patience.lost(error)
            continue
        if has_ended(client, machine, patience):
            return
        patience.lost(CutOff("kvmd is stopping"))


class Lines:
    """Makes lines of bytes that come in any pieces; the last may be without an end."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the lines that these bytes complete; one that is too long comes in pieces."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        yield from lines
        if len(self._rest) > LINE_LIMIT:
            yield self.rest()

    def rest(self) -> bytes:
        """Return what is there of the last line."""
        rest, self._rest = self._rest, b""
        return rest


class _AllThere(Exception):
    """What is kept has come."""
