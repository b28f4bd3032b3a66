"""What ``kvmctl top`` shows: figures of machines at one moment, and how fast they grew since the one before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from kvmd.ctl.answers import number, objects, text

HOTTEST_SHOWN = 5
LATENCIES = ("waiting_us", "applying_us", "discarding_us")


class Counted(NamedTuple):
    """What a machine did so far.

    Attributes:
        to_shared, to_private: conversions that changed something.
        other: requests that changed nothing.
        shared_bytes, private_bytes: of its memory, now.
        latencies: the median and the 99th percentile of each of ``LATENCIES``, in microseconds.
        lost: records that were dropped before they were counted.
        held_back_us: how long vCPUs were kept out of the guest, all together, in microseconds.
    """

    to_shared: int
    to_private: int
    other: int
    shared_bytes: int
    private_bytes: int
    latencies: tuple[tuple[float, float], ...]
    lost: int
    held_back_us: int


class Row(NamedTuple):
    """One machine, as it is shown.

    Attributes:
        name, state: of the machine.
        counted: what it did; None where it did not say.
        to_shared, to_private, other: a second, since the moment before.
        held_back: for how many vCPUs' time its guest was kept waiting by its rate, since the moment before.
    """

    name: str
    state: str
    counted: Counted | None
    to_shared: float
    to_private: float
    other: float
    held_back: float

    def document(self) -> dict[str, object]:
        """Return it for programs."""
        found = self.counted
        figures: dict[str, object] = {"name": self.name, "state": self.state}
        if found is None:
            return figures
        return {
            **figures,
            "to_shared_per_second": round(self.to_shared, 3),
            "to_private_per_second": round(self.to_private, 3),
            "other_per_second": round(self.other, 3),
            "held_back_vcpus": round(self.held_back, 3),
            "shared_bytes": found.shared_bytes,
            "private_bytes": found.private_bytes,
            "lost": found.lost,
            **{key: {"p50": p50, "p99": p99} for key, (p50, p99) in zip(LATENCIES, found.latencies, strict=True)},
        }


class Hot(NamedTuple):
    """A range that is converted often.

    Attributes:
        machine: whose.
        gpa: its start, as the daemon writes it.
        size_bytes: of it.
        times: how often since its machine's start: kvmd counts every conversion, and says by how much this may be too
            high (``kvmd.conversion.hottest``).
        per_second: how much of it a second, since the moment before.
    """

    machine: str
    gpa: str
    size_bytes: int
    times: int
    per_second: float

    def document(self) -> dict[str, object]:
        """Return it for programs."""
        return {
            "machine": self.machine,
            "gpa": self.gpa,
            "size": self.size_bytes,
            "count": self.times,
            "per_second": round(self.per_second, 3),
        }


def counted(answer: dict[str, Any]) -> Counted:
    """Return what a machine's counters say.

    Raises:
        NotKvmd: they are none.
    """
    sums = Counter[str]()
    for each in objects(answer, "requests"):
        key = str(each.get("to")) if each.get("outcome") == "converted" else "other"
        sums[key] += number(each, "count")
    return Counted(
        to_shared=sums["shared"],
        to_private=sums["private"],
        other=sums["other"],
        shared_bytes=number(answer, "shared_bytes"),
        private_bytes=number(answer, "private_bytes"),
        latencies=tuple(_percentiles(answer.get(key)) for key in LATENCIES),
        lost=number(answer, "lost"),
        held_back_us=number(answer, "held_back_us"),
    )


def _percentiles(found: object) -> tuple[float, float]:
    match found:
        case {"p50": int() | float() as p50, "p99": int() | float() as p99}:
            return float(p50), float(p99)
        case _:
            return 0.0, 0.0


class Rates:
    """Makes rates of counters, look by look."""

    def __init__(self) -> None:
        self._before: dict[str, tuple[float, Counted]] = {}

    def row(self, name: str, state: str, now: float, found: Counted | None) -> Row:
        """Return a machine's figures, with what was added since the look before.

        Args:
            name: the machine's.
            state: its state.
            now: seconds of a clock that only goes on.
            found: what it did so far.
        """
        before = self._before.pop(name, None)
        if found is None:
            return Row(name, state, None, 0.0, 0.0, 0.0, 0.0)
        self._before[name] = now, found
        if before is None or now <= before[0]:
            return Row(name, state, found, 0.0, 0.0, 0.0, 0.0)
        then, old = before
        # A machine that was made anew under an old one's name begins at 0 again.
        grown = [
            max(0, new - earlier) / (now - then)
            for new, earlier in (
                (found.to_shared, old.to_shared),
                (found.to_private, old.to_private),
                (found.other, old.other),
                (found.held_back_us / 1e6, old.held_back_us / 1e6),
            )
        ]
        return Row(name, state, found, *grown)

    def keep(self, names: Iterable[str]) -> None:
        """Forget all other machines."""
        kept = set(names)
        self._before = {name: found for name, found in self._before.items() if name in kept}


class HotPages:
    """Which of the ranges that machines name as their hottest are converted most now, look by look."""

    def __init__(self) -> None:
        self._before: dict[tuple[str, str, int], tuple[float, int]] = {}
        self._found: list[Hot] = []

    def begin(self) -> None:
        """Begin the next look."""
        found, self._found = self._found, []
        kept = {(hot.machine, hot.gpa, hot.size_bytes) for hot in found}
        self._before = {key: before for key, before in self._before.items() if key in kept}

    def add(self, machine: str, now: float, answer: dict[str, Any]) -> None:
        """Take what a machine's counters say of its hottest ranges.

        Args:
            machine: its name.
            now: seconds of a clock that only goes on.
            answer: its counters.

        Raises:
            NotKvmd: they are none.
        """
        for range_ in objects(answer, "hottest"):
            key = machine, text(range_, "gpa"), number(range_, "size")
            count = number(range_, "count")
            then, earlier = self._before.get(key, (now, count))
            self._before[key] = now, count
            # A machine that was made anew under an old one's name begins at 0 again.
            grown = max(0, count - earlier) / (now - then) if now > then else 0.0
            self._found.append(Hot(*key, count, grown))

    def hottest(self) -> list[Hot]:
        """Return the first few: those that grew most since the look before, and then those that were converted most."""
        return sorted(self._found, key=lambda hot: (-hot.per_second, -hot.times, hot.machine, int(hot.gpa, 0)))[
            :HOTTEST_SHOWN
        ]
