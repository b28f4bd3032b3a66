"""Turn-taking, medians and tables: what every benchmark is made of.

The machine that measures is shared and noisy, and its absolute times swing by a factor of two from minute to minute.
So each figure is a ratio of two things that took turns (A B A B ...), and what counts is the median of the ratios of
neighbours; absolute times stand beside it for orientation only.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

_STEAL = 7
"""The column of /proc/stat's cpu line that counts time taken by the host's other guests (proc(5), 'cpu')."""


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line asks for.

    Attributes:
        quick: few and short rounds, to see that it works.
        large: machines of 1 TiB too, which take seconds and gigabytes.
    """

    quick: bool = False
    large: bool = False

    def rounds(self, usual: int) -> int:
        """Return how many rounds to measure where ``usual`` are right: at least 3."""
        return max(3, usual // 5) if self.quick else usual


class CannotMeasure(Exception):
    """This host lacks what a benchmark needs; the message says what."""


@dataclass(frozen=True, slots=True)
class Series:
    """What one thing measured, round by round.

    Attributes:
        label: the thing.
        unit: of the values, such as ``us`` or ``s``.
        values: one for each round.
    """

    label: str
    unit: str
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median of the values."""
        return median(self.values)


@dataclass(frozen=True, slots=True)
class Ratio:
    """One thing beside another that it took turns with.

    Attributes:
        subject: the one.
        beside: the other.
        target: what the median of the ratios should be at most, or None.
    """

    subject: Series
    beside: Series
    target: float | None = None

    @property
    def ratios(self) -> tuple[float, ...]:
        """The ratio of each round."""
        return tuple(one / other for one, other in zip(self.subject.values, self.beside.values, strict=True))

    @property
    def median(self) -> float:
        """The median of the ratios, which is not the ratio of the medians."""
        return median(self.ratios)


@dataclass(frozen=True, slots=True)
class Fact:
    """A figure that has nothing beside it.

    Attributes:
        series: what was measured.
        target: what the median should be at most, or None.
    """

    series: Series
    target: float | None = None


@dataclass(slots=True)
class Report:
    """What one benchmark found.

    Attributes:
        name: of the benchmark.
        title: one line.
        ratios: figures beside one another.
        facts: figures by themselves.
        notes: what the reader must know, the host's load among it.
    """

    name: str
    title: str
    ratios: list[Ratio] = field(default_factory=list)
    facts: list[Fact] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def compare(self, series: Mapping[str, Series], beside: str, target: float | None = None) -> None:
        """Add a ratio of every series to the one of the key ``beside``, all with the same target."""
        for key, subject in series.items():
            if key != beside:
                self.ratios.append(Ratio(subject, series[beside], target))


def take_turns(
    things: Mapping[str, Callable[[], float]], *, rounds: int, unit: str, warm_up: bool = True
) -> dict[str, Series]:
    """Let the things take turns, ``rounds`` times.

    Args:
        things: by label: does its work once and returns what it measured.
        rounds: how often.
        unit: of what they return.
        warm_up: let each go once before, without counting it.
    """
    columns = take_turns_together(
        {label: partial(_alone, measure) for label, measure in things.items()},
        rounds=rounds,
        units=(unit,),
        warm_up=warm_up,
    )
    return {label: column[0] for label, column in columns.items()}


def _alone(measure: Callable[[], float]) -> tuple[float]:
    return (measure(),)


def take_turns_together(
    things: Mapping[str, Callable[[], Sequence[float]]],
    *,
    rounds: int,
    units: Sequence[str],
    warm_up: bool = True,
) -> dict[str, tuple[Series, ...]]:
    """Do the same with things that measure several values each, one for each of ``units``."""
    if warm_up:
        for measure in things.values():
            measure()
    rows: dict[str, list[Sequence[float]]] = {label: [] for label in things}
    for _ in range(rounds):
        for label, measure in things.items():
            rows[label].append(measure())
    return {
        label: tuple(Series(label, unit, tuple(row[column] for row in measured)) for column, unit in enumerate(units))
        for label, measured in rows.items()
    }


class LoadWatch:
    """Notes how busy the host is with other things, from its construction on."""

    def __init__(self) -> None:
        self._before = os.getloadavg()[0]
        self._times = _cpu_times()

    def note(self) -> str:
        """Return one line about the time since."""
        passed = [now - before for now, before in zip(_cpu_times(), self._times, strict=True)]
        stolen = f", {100 * passed[_STEAL] / sum(passed):.0f} % of CPU time stolen" if sum(passed) else ""
        return f"host: {os.cpu_count()} CPUs, load average {self._before:.1f} to {os.getloadavg()[0]:.1f}{stolen}"


def _cpu_times() -> list[int]:
    first_line = Path("/proc/stat").read_text(encoding="ascii").partition("\n")[0]
    return [int(word) for word in first_line.split()[1:9]]
