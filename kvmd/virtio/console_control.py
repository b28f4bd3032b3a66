"""What a console device and its driver say of ports: clause 5.3.6.2 of virtio 1.2, as a plain state without I/O."""

from __future__ import annotations

import enum
import struct

from kvmd.virtio.split_queue import QueueError

PORT = 1
"""The number of the one port that there is. Port 0 would be the guest's console by old custom: Linux made a terminal of
it whatever the host said."""

CONTROL = struct.Struct("<IHH")
"""struct virtio_console_control: port, event, value."""

NAME_LIMIT = 64


class Event(enum.IntEnum):
    """Events of clause 5.3.6.2."""

    DEVICE_READY = 0
    PORT_ADD = 1
    PORT_REMOVE = 2
    PORT_READY = 3
    CONSOLE_PORT = 4
    RESIZE = 5
    PORT_OPEN = 6
    PORT_NAME = 7


class PortControl:
    """The state of the port between its two sides, from one reset to the next.

    What is still to be told is bounded whatever the driver asks for, and however often the host's side comes and goes.

    Args:
        name: of the port: what /dev/virtio-ports has in the guest.

    Attributes:
        guest_open: whether a program in the guest has the port open.
    """

    def __init__(self, name: str) -> None:
        self.guest_open = False
        self._name = name.encode("ascii")
        self._known = False
        self._announce: dict[Event, bytes] = {}
        self._openings: list[bool] = []
        self._host_open = False

    def host(self, *, is_open: bool) -> None:
        """Note whether somebody is at the host's end."""
        if is_open == self._host_open:
            return
        self._host_open = is_open
        if not self._known:
            return
        # A visit that the guest has not heard of yet need not be told; the end of one that it knows has to be, so that
        # two visits are not one.
        if not is_open and self._openings and self._openings[-1]:
            self._openings.pop()
        else:
            self._openings.append(is_open)

    def received(self, message: bytes) -> None:
        """Take a message of the driver's. Ports that there are not, and unknown events, are nobody's business.

        Raises:
            QueueError: it is too short.
        """
        if len(message) < CONTROL.size:
            raise QueueError(f"a control message of {len(message)} bytes: it has {CONTROL.size}")
        port, event, value = CONTROL.unpack_from(message)
        if event == Event.DEVICE_READY:
            if value:
                self._announce[Event.PORT_ADD] = CONTROL.pack(PORT, Event.PORT_ADD, 1)
        elif port == PORT and event == Event.PORT_READY:
            if value and not self._known:
                self._known = True
                self._announce[Event.PORT_NAME] = CONTROL.pack(PORT, Event.PORT_NAME, 1) + self._name
                if self._host_open:
                    self._openings.append(True)
        elif port == PORT and event == Event.PORT_OPEN:
            self.guest_open = bool(value)

    def next(self) -> bytes | None:
        """Return what the driver is to be told next, or None; ``told`` takes it off."""
        if self._announce:
            return next(iter(self._announce.values()))
        if self._openings:
            return CONTROL.pack(PORT, Event.PORT_OPEN, self._openings[0])
        return None

    def told(self) -> None:
        """Note that the driver has what ``next`` returned."""
        if self._announce:
            del self._announce[next(iter(self._announce))]
        else:
            del self._openings[0]
