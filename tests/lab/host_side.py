"""The host's part of the conformance guest: answers what each vCPU asks for in its mailbox page."""

from __future__ import annotations

import struct
import threading
from collections import Counter

from kvmd.errors import BackendError
from kvmd.machine import Machine
from kvmd.memory.accessor import PrivateMemory
from kvmd.ranges import GpaRange, PageState
from kvmd.units import PAGE_SIZE

_MAILBOX = struct.Struct("<8Q")  # request, answer, status, what, gpa, size, expected, replacement
_ANSWER_OFFSET = 8

ASK_SHARED, ASK_PRIVATE, ASK_ALTERNATE, ASK_PUNCH = range(1, 5)
"""As in kvmd/guests/src/conformance.c."""

GOOD, WRONG_CONTENT, NOT_PRIVATE, NOT_SHARED, NOT_PUNCHED, UNKNOWN = range(6)
"""What the guest prints where it is not ``GOOD``."""

_BELL_PORT = 0x0B


class HostSide:
    """A device of a machine that runs the conformance guest: a vCPU that has put a request into its mailbox rings here.

    It is answered in the vCPU's own thread, while the others go on.

    Args:
        machine: not running yet.

    Attributes:
        answered: how many requests of each kind were answered.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._first = machine.pinned.end
        self._lock = threading.Lock()
        self.answered: Counter[int] = Counter()
        machine.ports.add(_BELL_PORT, 1, self)

    def read(self, offset: int) -> int:
        """Say nothing: the bell is only rung."""
        return offset & 0

    def write(self, offset: int, value: int) -> None:
        """Answer vCPU ``value``."""
        assert offset == 0
        memory, mailbox = self._machine.memory, self._first + value * PAGE_SIZE
        request, answer, _, what, gpa, size, expected, replacement = _MAILBOX.unpack(
            memory.read(mailbox, _MAILBOX.size)
        )
        assert request == answer + 1
        status = self._answer(what, gpa, size, expected, replacement)
        with self._lock:
            self.answered[what] += 1
        memory.write(mailbox + _ANSWER_OFFSET, struct.pack("<QQ", request, status))

    def _answer(self, what: int, gpa: int, size: int, expected: int, replacement: int) -> int:
        if what == ASK_SHARED:
            return self._shared(gpa, size, expected, replacement)
        if what == ASK_PRIVATE:
            return max(self._private(page) for page in range(gpa, gpa + size, PAGE_SIZE))
        if what == ASK_ALTERNATE:
            return max(
                self._shared(page, PAGE_SIZE, expected, replacement)
                if (page - gpa) & PAGE_SIZE
                else self._private(page)
                for page in range(gpa, gpa + size, PAGE_SIZE)
            )
        if what == ASK_PUNCH:
            return self._punch(GpaRange.of_size(gpa, size))
        return UNKNOWN

    def _shared(self, gpa: int, size: int, expected: int, replacement: int) -> int:
        memory = self._machine.memory
        try:
            if memory.read(gpa, size) != bytes([expected]) * size:
                return WRONG_CONTENT
            memory.write(gpa, bytes([replacement]) * size)
        except PrivateMemory:
            return NOT_SHARED
        return GOOD

    def _private(self, page: int) -> int:
        for touch in (lambda: self._machine.memory.read(page + 8, 8), lambda: self._machine.memory.write(page, b"x")):
            try:
                touch()
            except PrivateMemory:
                continue
            return NOT_PRIVATE
        return GOOD

    def _punch(self, range_: GpaRange) -> int:
        hardware = self._machine._hardware
        try:
            with hardware.lock:
                hardware.protection.discard(range_, PageState.PRIVATE)
        except BackendError:
            return NOT_PUNCHED
        return GOOD
