"""Which conversions somebody wants to see: the same filters for those that are kept and for those that happen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, cast

from fastapi import Depends, Query

from kvmd.api.problems import Problem, ProblemType

ADDRESS = "^(0x[0-9a-fA-F]{1,16}|[0-9]{1,19})$"

Cause = Annotated[Literal["implicit", "explicit"] | None, Query(description="only conversions of this cause")]
Direction = Annotated[Literal["private", "shared"] | None, Query(description="only those to this state")]
Outcome = Annotated[
    Literal["converted", "spurious", "stale", "refused", "failed"] | None, Query(description="only those answered so")
]
Vcpu = Annotated[int | None, Query(ge=0, lt=1 << 32, description="only those that this vCPU asked for")]
Gpa = Annotated[
    str | None,
    Query(pattern=ADDRESS, description="only those that reach into `size` bytes from here; 0x for hexadecimal"),
]
Size = Annotated[int | None, Query(ge=1, lt=1 << 63, description="with `gpa`: bytes, by default 1")]


@dataclass(frozen=True, slots=True)
class ConversionFilter:
    """What a conversion must be to be shown.

    Attributes:
        exact: members of its record, and the value that each must have.
        within: half-open range of guest-physical addresses that it must reach into, or None.
    """

    exact: Mapping[str, object]
    within: tuple[int, int] | None = None

    @property
    def takes_all(self) -> bool:
        """Whether there is nothing that it leaves out."""
        return not self.exact and self.within is None

    def takes(self, record: Mapping[str, object]) -> bool:
        """Tell whether a conversion is shown.

        Args:
            record: as ``kvmd.log.conversion_event`` makes it.
        """
        for key, value in self.exact.items():
            if record[key] != value:
                return False
        if self.within is None:
            return True
        start, end = self.within
        gpa = int(cast("str", record["gpa"]), 16)
        return gpa < end and start < gpa + cast("int", record["size"])


async def conversion_filter(
    cause: Cause = None,
    to: Direction = None,
    outcome: Outcome = None,
    vcpu: Vcpu = None,
    gpa: Gpa = None,
    size: Size = None,
) -> ConversionFilter:
    """Return the filter that a query describes. A coroutine, since FastAPI gives anything else to a worker thread.

    Raises:
        Problem: ``size`` came without ``gpa``.
    """
    members = {"cause": cause, "to": to, "outcome": outcome, "vcpu": vcpu}
    exact = {key: value for key, value in members.items() if value is not None}
    if gpa is None:
        if size is not None:
            mistake = {"where": "query.size", "problem": "it goes with gpa"}
            raise Problem(ProblemType.INVALID_REQUEST, "query.size: it goes with gpa", more={"errors": [mistake]})
        return ConversionFilter(exact)
    start = address(gpa)
    return ConversionFilter(exact, (start, start + (size or 1)))


Wanted = Annotated[ConversionFilter, Depends(conversion_filter)]
"""A route's parameter: the conversions that its query names."""


def address(text: str) -> int:
    """Return the address that a text of the form ``ADDRESS`` names."""
    return int(text, 16 if text.startswith("0x") else 10)
