"""Turn-taking, medians and tables: what every benchmark is made of.

The machine that measures is shared and noisy, and its absolute times swing by a factor of two from minute to minute.
So each figure is a ratio of two things that took turns (A B A B ...), and what counts is the median of the ratios of
neighbours; absolute times stand beside it for orientation only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median, quantiles


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

    @property
    def middle(self) -> tuple[float, float]:
        """The first and the third quartile of the values."""
        return middle(self.values)


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
        """The ratio of each round, but of those in which the other did nothing.

        Raises:
            CannotMeasure: it did nothing in any.
        """
        pairs = zip(self.subject.values, self.beside.values, strict=True)
        ratios = tuple(one / other for one, other in pairs if other)
        if not ratios:
            raise CannotMeasure(f"{self.beside.label} did nothing in {len(self.beside.values)} rounds")
        return ratios

    @property
    def median(self) -> float:
        """The median of the ratios, which is not the ratio of the medians."""
        return median(self.ratios)

    @property
    def middle(self) -> tuple[float, float]:
        """The first and the third quartile of the ratios."""
        return middle(self.ratios)


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
        notes: what the reader must know.
        missing: what could not be measured here, or had nothing beside it, and why: one line each.
        figures: kvmd's own run in single values, for programs that read them: keys of their own in the JSON.
        conditions: what ``Conditions.as_json`` says of the time that it took.
    """

    name: str
    title: str
    ratios: list[Ratio] = field(default_factory=list)
    facts: list[Fact] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    figures: dict[str, object] = field(default_factory=dict)
    conditions: dict[str, object] = field(default_factory=dict)

    def compare(self, series: Mapping[str, Series], beside: str, target: float | None = None) -> None:
        """Add a ratio of every series to the one of the key ``beside``, all with the same target.

        Where that one is not there, they are facts.
        """
        if beside not in series:
            self.facts += [Fact(subject) for subject in series.values()]
            return
        for key, subject in series.items():
            if key != beside:
                self.ratios.append(Ratio(subject, series[beside], target))


def middle(values: Sequence[float]) -> tuple[float, float]:
    """Return the first and the third quartile: half of the values lie between."""
    if len(values) == 1:
        return values[0], values[0]
    first, _, third = quantiles(values, n=4, method="inclusive")
    return first, third


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
