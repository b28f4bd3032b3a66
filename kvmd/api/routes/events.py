"""Streams of events, of one machine and of all: server-sent events (HTML, 9.2)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query
from fastapi.responses import Response

from kvmd.api.encoders import EVENT_STREAM, EventEncoder
from kvmd.api.filters import ConversionFilter, Wanted
from kvmd.api.openapi import problems
from kvmd.api.problems import Problem, ProblemType
from kvmd.api.routes.query import StrictRoute
from kvmd.api.services import Services
from kvmd.api.streams import Streaming
from kvmd.fleet.base import EventStream

LAST_ID_LIMIT = 15_000
"""Characters of an id: what a request's header has room for (``Limits.header_bytes``), some 400 machines."""

Kind = Literal["conversion", "lifecycle", "counters"]
Kinds = Annotated[list[Kind] | None, Query(max_length=3, description="only these, and what was lost")]
LastEventId = Annotated[
    str | None,
    Header(
        alias="Last-Event-ID",
        max_length=LAST_ID_LIMIT,
        description="the `id` of the last event that the reader saw; the stream of all machines needs some 35 bytes "
        "for each",
    ),
]

_STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "events `conversion`, `lifecycle`, `counters` and `lost`, each with the machine's name in its "
        "data; without an end of its own for all machines, up to its machine's end for one",
        "content": {"text/event-stream": {}},
    }
}


def router(services: Services) -> APIRouter:
    """Return the routes."""
    fleet = services.fleet
    routes = APIRouter(tags=["events"], route_class=StrictRoute)

    @routes.get(
        "/events",
        response_class=Response,
        responses={**problems(ProblemType.UNKNOWN_EVENT), **_STREAM},
        operation_id="follow_events",
    )
    async def follow_events(wanted: Wanted, kind: Kinds = None, last_event_id: LastEventId = None) -> Response:
        """What happens to all machines, from now on or from after the last event that the reader saw."""
        return _events(None, kind, wanted, last_event_id)

    @routes.get(
        "/machines/{name}/events",
        response_class=Response,
        responses={**problems(ProblemType.UNKNOWN_MACHINE, ProblemType.UNKNOWN_EVENT), **_STREAM},
        operation_id="follow_machine_events",
    )
    async def follow_machine_events(
        name: str, wanted: Wanted, kind: Kinds = None, last_event_id: LastEventId = None
    ) -> Response:
        """What happens to one machine; the stream ends with it."""
        return _events(name, kind, wanted, last_event_id)

    def _events(
        name: str | None, kinds: list[Kind] | None, conversions: ConversionFilter, last_id: str | None
    ) -> Response:
        wanted = frozenset({*(kinds or ("conversion", "lifecycle", "counters")), "lost"})
        return Streaming(
            lambda: _known(fleet.events(name, last_id=last_id)),
            lambda stream: EventEncoder(stream, wanted, conversions),
            media_type=EVENT_STREAM,
        )

    return routes


@asynccontextmanager
async def _known(inner: AbstractAsyncContextManager[EventStream]) -> AsyncIterator[EventStream]:
    """Enter a stream of events, and refuse ids that were never any."""
    async with AsyncExitStack() as stack:
        try:
            events = await stack.enter_async_context(inner)
        except ValueError as error:
            raise unknown_event(str(error)) from error
        yield events


def unknown_event(why: str) -> Problem:
    """Return the refusal of a ``Last-Event-ID``."""
    return Problem(ProblemType.UNKNOWN_EVENT, f"{why}: begin without Last-Event-ID")
