"""How many processes are kept waiting for a machine, and in which units: decided here, without I/O."""

from __future__ import annotations


class PoolPlan:
    """Counts units by what they do.

    Args:
        spare: processes to keep waiting.
        most_starting: units that start at the same time: beyond a few a processor each only slows down the others.
    """

    def __init__(self, spare: int, most_starting: int) -> None:
        self.spare = spare
        self._most_starting = most_starting
        self._starting: set[int] = set()
        self._waiting: list[int] = []
        self._busy: set[int] = set()
        self._ill: set[int] = set()
        self._asked = 0

    @property
    def waiting(self) -> int:
        """Processes that wait for a machine."""
        return len(self._waiting)

    def ask(self) -> None:
        """Note somebody who wants a process."""
        self._asked += 1

    def give_up(self) -> None:
        """Note that they do not want it any more, or have it."""
        self._asked -= 1

    def start_one(self, *, spares: bool) -> int | None:
        """Return the number of a unit to start now, the smallest that is free; None where there are enough.

        After one that was lost, until it is free, and while somebody waits for one that is not there yet, only as many
        are started as somebody waits for.

        Args:
            spares: whether to start some that nobody waits for, too.
        """
        lacking = self._asked > len(self._waiting)
        wanted = (self.spare if spares and not self._ill and not lacking else 0) + self._asked
        if len(self._waiting) + len(self._starting) >= wanted or len(self._starting) >= self._most_starting:
            return None
        number = 1
        while number in self._starting or number in self._busy or number in self._waiting:
            number += 1
        self._starting.add(number)
        return number

    def came(self, number: int) -> bool:
        """Note a process that waits; False where its unit was not asked for."""
        if number not in self._starting:
            return False
        self._starting.remove(number)
        self._waiting.append(number)
        return True

    def take(self) -> int | None:
        """Return the number of the process that has waited longest, or None; its unit is in use from now on."""
        if not self._waiting:
            return None
        number = self._waiting.pop(0)
        self._busy.add(number)
        return number

    def surplus(self) -> int | None:
        """Return the number of one that waits and need not, or None; its unit is in use until it is free."""
        if len(self._waiting) <= self.spare + self._asked:
            return None
        number = self._waiting.pop()
        self._busy.add(number)
        return number

    def lost(self, number: int) -> None:
        """Note that a unit did not start, or that what waited is gone; the unit is in use until it is free."""
        self._starting.discard(number)
        if number in self._waiting:
            self._waiting.remove(number)
        self._busy.add(number)
        self._ill.add(number)

    def use(self, number: int) -> bool:
        """Note a unit that something else is in; False where that was known."""
        known = number in self._busy
        self._busy.add(number)
        return not known

    def free(self, number: int) -> None:
        """Note that a unit has ended."""
        self._busy.discard(number)
        self._ill.discard(number)
