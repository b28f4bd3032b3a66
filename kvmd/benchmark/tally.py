"""What a run's conversions cost, out of their records: the first round's apart from the others'."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kvmd.benchmark.measure import CannotMeasure
from kvmd.conversion.messages import Outcome
from kvmd.conversion.record import ConversionRecord


@dataclass(frozen=True, slots=True)
class Run:
    """What a run cost, in microseconds.

    Attributes:
        conversions: those after the first round.
        us_per_conversion: wall time of each of them, the guest's own time included.
        us_in_kvm: of that, the mean time of changing slots or attributes and of discarding the side left behind.
        first_round: conversions of the first round, which cuts memory into pages.
        us_first_round: wall time of each of them, from the first fault on.
        us_first: time of changing slots in the very first one, which cuts a block.
    """

    conversions: int
    us_per_conversion: float
    us_in_kvm: float
    first_round: int
    us_first_round: float
    us_first: float


class Tally:
    """Counts records as they come, and keeps none.

    Only conversions that a request of a vCPU made count: what was spurious, merged into another or refused does not.

    Args:
        first_round: how many conversions the first round has, of all vCPUs together.
    """

    def __init__(self, first_round: int) -> None:
        self._first_round = first_round
        self._count = 0
        self._began_ns = self._first_ended_ns = self._last_ns = 0
        self._us_first = 0.0
        self._us_in_kvm = 0.0

    @property
    def count(self) -> int:
        """Conversions so far."""
        return self._count

    def add(self, records: Iterable[ConversionRecord]) -> None:
        """Count the next ones, in their order."""
        for record in records:
            if record.outcome is not Outcome.CONVERTED:
                continue
            if not self._count:
                # A record has the time of the answer; what came before is the fault.
                self._began_ns = record.monotonic_ns - record.waiting_ns - record.applying_ns
                self._us_first = record.applying_ns / 1000
            self._count += 1
            self._last_ns = record.monotonic_ns
            if self._count <= self._first_round:
                self._first_ended_ns = record.monotonic_ns
            else:
                self._us_in_kvm += (record.applying_ns + record.discarding_ns) / 1000

    def run(self, expected: int) -> Run:
        """Return what they cost.

        Args:
            expected: how many there should be, those of the first round included.

        Raises:
            CannotMeasure: there are more or fewer.
        """
        if self._count != expected or expected <= self._first_round:
            raise CannotMeasure(f"the guest made {self._count} conversions instead of {expected}")
        rest = self._count - self._first_round
        return Run(
            conversions=rest,
            us_per_conversion=(self._last_ns - self._first_ended_ns) / 1000 / rest,
            us_in_kvm=self._us_in_kvm / rest,
            first_round=self._first_round,
            us_first_round=(self._first_ended_ns - self._began_ns) / 1000 / self._first_round,
            us_first=self._us_first,
        )
