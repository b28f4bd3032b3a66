"""A machine's memory: its map, its contents where they are shared, the conversions between, and the counters."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from kvmd.api.filters import ADDRESS, Wanted, address
from kvmd.api.models import Conversions, MachineCounters, MemoryMap
from kvmd.api.openapi import problems
from kvmd.api.pages import RANGES_DEFAULT, memory_map
from kvmd.api.problems import Problem, ProblemType
from kvmd.api.queries import From, Last, Limit, Ranges, Since, conversions_asked
from kvmd.api.routes.query import StrictRoute
from kvmd.api.services import Services, caller_of, json_response
from kvmd.fleet.base import counters_document
from kvmd.units import MIB

READ_LIMIT = MIB
"""Bytes of memory in one answer."""

Address = Annotated[str, Query(pattern=ADDRESS, description="hexadecimal with 0x, or not")]
_UNKNOWN = problems(ProblemType.UNKNOWN_MACHINE)
_LIVE = problems(ProblemType.UNKNOWN_MACHINE, ProblemType.WRONG_STATE)


def router(services: Services) -> APIRouter:
    """Return the routes."""
    fleet = services.fleet
    routes = APIRouter(prefix="/machines/{name}", tags=["memory"], route_class=StrictRoute)

    @routes.get("/memory/map", response_model=MemoryMap, responses=_LIVE, operation_id="get_memory_map")
    async def get_memory_map(name: str, from_: From = "0x0", limit: Ranges = RANGES_DEFAULT) -> Response:
        """The state of memory, as ranges from the one that holds `from`."""
        return json_response(await memory_map(fleet, name, address(from_), limit))

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
            data = await fleet.read_memory(name, address(gpa), size)
        except ValueError as error:
            raise Problem(ProblemType.OUTSIDE_MEMORY, str(error)) from error
        return Response(data, media_type="application/octet-stream")

    @routes.get("/conversions", response_model=Conversions, responses=_UNKNOWN, operation_id="list_conversions")
    async def list_conversions(
        name: str,
        wanted: Wanted,
        since: Since = 0,
        limit: Limit = None,
        last: Last = None,
    ) -> Response:
        """Recent conversions, oldest first; `next` is the `since` of the next page."""
        return json_response(await conversions_asked(fleet, name, wanted, since, limit, last))

    @routes.get("/counters", response_model=MachineCounters, responses=_UNKNOWN, operation_id="get_counters")
    async def get_counters(name: str) -> Response:
        """What the machine did so far; of a stopped one, at its end."""
        return json_response(counters_document(await fleet.counters(name)))

    return routes
