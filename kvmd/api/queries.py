"""Queries of small GETs: their parameters, declared once for FastAPI and for what is answered before it.

``kvmd.api.direct`` takes a query that is plainly right, checked by the validators that FastAPI makes of the same
declarations; one that is not goes on to FastAPI, which has the words for what is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any
from urllib.parse import parse_qsl

from fastapi import Query
from pydantic import TypeAdapter

from kvmd.api import filters
from kvmd.api.filters import ADDRESS, ConversionFilter, address, conversion_filter
from kvmd.api.pages import ALL, CONVERSIONS_DEFAULT, RANGES_DEFAULT, conversions, last_conversions, memory_map
from kvmd.api.problems import Problem, ProblemType
from kvmd.fleet.base import Fleet

RANGES_LIMIT = 65536
CONVERSIONS_LIMIT = 4096

From = Annotated[str, Query(alias="from", pattern=ADDRESS)]
Ranges = Annotated[int, Query(ge=1, le=RANGES_LIMIT)]
Since = Annotated[int, Query(ge=0, lt=1 << 63, description="a sequence number: those above it")]
Limit = Annotated[int | None, Query(ge=1, le=CONVERSIONS_LIMIT, description="the first so many; by default 256")]
Last = Annotated[int | None, Query(ge=1, le=CONVERSIONS_LIMIT, description="the last so many instead")]

_FIELDS_LIMIT = 16
_ESCAPES = frozenset("%+")


class Parameters:
    """The parameters of one resource.

    Args:
        types: what each may be, by its name in a query: types of this module and of ``kvmd.api.filters``.
    """

    def __init__(self, types: Mapping[str, Any]) -> None:
        self._validators = {name: TypeAdapter(type_).validate_python for name, type_ in types.items()}

    @property
    def names(self) -> frozenset[str]:
        """Their names."""
        return frozenset(self._validators)

    def parse(self, query: bytes) -> dict[str, Any] | None:
        """Return the parameters that a query gives, or None where it is not plainly right.

        Not plain is, beside what is wrong, a parameter that comes twice.
        """
        text = query.decode("latin-1")
        found: dict[str, Any] = {}
        try:
            for name, value in _pairs(text) if _ESCAPES.isdisjoint(text) else _parsed(text):
                if name in found:
                    return None
                found[name] = self._validators[name](value)
        except (KeyError, ValueError):  # pydantic's ValidationError is one
            return None
        return found


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    """Yield names and values where nothing is escaped: parse_qsl takes as long as all that follows."""
    for pair in text.split("&"):
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(pair)
        yield name, value


def _parsed(text: str) -> list[tuple[str, str]]:
    return parse_qsl(text, keep_blank_values=True, strict_parsing=True, max_num_fields=_FIELDS_LIMIT)


CONVERSIONS = Parameters(
    {
        "cause": filters.Cause,
        "to": filters.Direction,
        "outcome": filters.Outcome,
        "vcpu": filters.Vcpu,
        "gpa": filters.Gpa,
        "size": filters.Size,
        "since": Since,
        "limit": Limit,
        "last": Last,
    }
)
MEMORY_MAP = Parameters({"from": From, "limit": Ranges})


async def conversions_asked(
    fleet: Fleet,
    name: str,
    wanted: ConversionFilter = ALL,
    since: int = 0,
    limit: int | None = None,
    last: int | None = None,
) -> dict[str, object]:
    """Return the page of conversions that a query asks for.

    Raises:
        Problem: both ``limit`` and ``last`` are given.
        KvmdError: as ``Fleet.conversions`` does.
    """
    if last is None:
        return await conversions(fleet, name, since, limit or CONVERSIONS_DEFAULT, wanted)
    if limit is not None:
        mistake = {"where": "query.last", "problem": "it takes the place of limit"}
        raise Problem(
            ProblemType.INVALID_REQUEST, "query.last: it takes the place of limit", more={"errors": [mistake]}
        )
    return await last_conversions(fleet, name, since, last, wanted)


async def conversions_of_query(fleet: Fleet, name: str, query: bytes) -> dict[str, object] | None:
    """Return the page that a query asks for, or None where FastAPI is to answer it.

    Raises:
        Problem: parameters contradict each other.
        KvmdError: as ``Fleet.conversions`` does.
    """
    given = CONVERSIONS.parse(query)
    if given is None:
        return None
    page = {key: given.pop(key) for key in ("since", "limit", "last") if key in given}
    return await conversions_asked(fleet, name, await conversion_filter(**given) if given else ALL, **page)


async def memory_map_of_query(fleet: Fleet, name: str, query: bytes) -> dict[str, object] | None:
    """Return the page that a query asks for, or None where FastAPI is to answer it.

    Raises:
        KvmdError: as ``Fleet.memory_map`` does.
    """
    given = MEMORY_MAP.parse(query)
    if given is None:
        return None
    return await memory_map(fleet, name, address(given.get("from", "0x0")), given.get("limit", RANGES_DEFAULT))
