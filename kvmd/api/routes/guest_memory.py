"""A machine's memory: its map, its contents where they are shared, the conversions between, and the counters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, cast

import msgspec
from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from kvmd.api.models import Conversions, MachineCounters, MemoryMap
from kvmd.api.openapi import problems
from kvmd.api.problems import Problem, ProblemType
from kvmd.api.routes.query import StrictRoute
from kvmd.api.services import Services, caller_of, json_response
from kvmd.fleet.base import Fleet
from kvmd.units import MIB

READ_LIMIT = MIB
"""Bytes of memory in one answer."""

RANGES_LIMIT = 65536
CONVERSIONS_LIMIT = 4096
_SCAN_PAGE = 1024
_SCAN_LIMIT = 16384
"""Records that one request looks at, at most, for those that its filters let through."""

_ADDRESS = "^(0x[0-9a-fA-F]{1,16}|[0-9]{1,19})$"
Address = Annotated[
    str, Query(pattern="^(0x[0-9a-fA-F]{1,16}|[0-9]{1,19})$", description="hexadecimal with 0x, or not")
]
Direction = Annotated[Literal["private", "shared"] | None, Query(description="what was asked for")]
_UNKNOWN = problems(ProblemType.UNKNOWN_MACHINE)
_LIVE = problems(ProblemType.UNKNOWN_MACHINE, ProblemType.WRONG_STATE)


def router(services: Services) -> APIRouter:
    """Return the routes."""
    fleet = services.fleet
    routes = APIRouter(prefix="/machines/{name}", tags=["memory"], route_class=StrictRoute)

    @routes.get("/memory/map", response_model=MemoryMap, responses=_LIVE, operation_id="get_memory_map")
    async def get_memory_map(
        name: str,
        from_: Annotated[str, Query(alias="from", pattern=_ADDRESS)] = "0x0",
        limit: Annotated[int, Query(ge=1, le=RANGES_LIMIT)] = 4096,
    ) -> Response:
        """The state of memory, as ranges from the one that holds `from`."""
        start = _address(from_)
        rest = [entry for entry in await fleet.memory_map(name) if entry[0].end > start]
        shown = [
            {"gpa": hex(range_.start), "size": range_.size_bytes, "state": state.value}
            for range_, state in rest[:limit]
        ]
        following = hex(rest[limit][0].start) if len(rest) > limit else None
        return _json({"ranges": shown, "next": following})

    @routes.get(
        "/memory",
        response_class=Response,
        responses={
            **problems(
                ProblemType.UNKNOWN_MACHINE,
                ProblemType.WRONG_STATE,
                ProblemType.PRIVATE_MEMORY,
                ProblemType.OUTSIDE_MEMORY,
            ),
            200: {"description": "the bytes", "content": {"application/octet-stream": {}}},
        },
        operation_id="read_memory",
    )
    async def read_memory(
        request: Request, name: str, gpa: Address, size: Annotated[int, Query(ge=1, le=READ_LIMIT)]
    ) -> Response:
        """Guest memory that is shared, for operators; `private-memory` where a page of it is private."""
        caller_of(request).need_operator("read guests' memory")
        try:
            data = await fleet.read_memory(name, _address(gpa), size)
        except ValueError as error:
            raise Problem(ProblemType.OUTSIDE_MEMORY, str(error)) from error
        return Response(data, media_type="application/octet-stream")

    @routes.get("/conversions", response_model=Conversions, responses=_UNKNOWN, operation_id="list_conversions")
    async def list_conversions(
        name: str,
        since: Annotated[int, Query(ge=0, lt=1 << 63, description="a sequence number: those above it")] = 0,
        limit: Annotated[int, Query(ge=1, le=CONVERSIONS_LIMIT)] = 256,
        cause: Literal["implicit", "explicit"] | None = None,
        to: Direction = None,
        outcome: Literal["converted", "spurious", "stale", "refused", "failed"] | None = None,
        vcpu: Annotated[int | None, Query(ge=0, lt=1 << 32)] = None,
    ) -> Response:
        """Recent conversions, oldest first; `next` is the `since` of the next page."""
        filters = {"cause": cause, "to": to, "outcome": outcome, "vcpu": vcpu}
        wanted = {key: value for key, value in filters.items() if value is not None}
        return _json(await _page(fleet, name, since, limit, wanted))

    @routes.get("/counters", response_model=MachineCounters, responses=_UNKNOWN, operation_id="get_counters")
    async def get_counters(name: str) -> Response:
        """What the machine did so far; of a stopped one, at its end."""
        return json_response(MachineCounters.of(await fleet.counters(name)))

    return routes


async def _page(fleet: Fleet, name: str, since: int, limit: int, wanted: Mapping[str, object]) -> dict[str, object]:
    """Return one page, looking at no more than ``_SCAN_LIMIT`` records."""
    found: list[dict[str, object]] = []
    position, looked_at, lost, more = since, 0, 0, True
    while more and len(found) < limit and looked_at < _SCAN_LIMIT:
        size = min(limit, _SCAN_PAGE) if not wanted else _SCAN_PAGE
        records = await fleet.conversions(name, since=position, limit=size)
        more = len(records) == size
        for record in records:
            sequence = cast("int", record["sequence"])
            if len(found) == limit:
                more = True
                break
            lost += sequence - position - 1
            position = sequence
            if all(record[key] == value for key, value in wanted.items()):
                found.append(record)
        looked_at += size
    return {"conversions": found, "next": position, "more": more, "lost": lost}


def _address(text: str) -> int:
    return int(text, 16 if text.startswith("0x") else 10)


def _json(document: object) -> Response:
    """Return plain data as JSON: of ten thousand records nobody needs a model each."""
    return Response(msgspec.json.encode(document), media_type="application/json")
