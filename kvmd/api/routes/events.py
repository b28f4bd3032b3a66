"""Streams of events, of one machine and of all: server-sent events (HTML, 9.2)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query
from fastapi.responses import Response

from kvmd.api.openapi import problems
from kvmd.api.problems import Problem, ProblemType
from kvmd.api.routes.query import StrictRoute
from kvmd.api.services import Services
from kvmd.api.streams import Streaming, sse
from kvmd.fleet.base import Event

Kind = Literal["conversion", "lifecycle", "counters"]
Kinds = Annotated[list[Kind] | None, Query(max_length=3, description="only these, and what was lost")]
LastEventId = Annotated[
    str | None,
    Header(alias="Last-Event-ID", max_length=128, description="the `id` of the last event that the reader saw"),
]

_GREETING = b"retry: 1000\n\n"
_KEEP_ALIVE = b": still here\n\n"
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

    @routes.get("/events", response_class=Response, responses={**problems(), **_STREAM}, operation_id="follow_events")
    async def follow_events(kind: Kinds = None, last_event_id: LastEventId = None) -> Response:
        """What happens to all machines, from now on or from after the last event that the reader saw."""
        return _events(None, kind, last_event_id)

    @routes.get(
        "/machines/{name}/events",
        response_class=Response,
        responses={**problems(ProblemType.UNKNOWN_MACHINE), **_STREAM},
        operation_id="follow_machine_events",
    )
    async def follow_machine_events(name: str, kind: Kinds = None, last_event_id: LastEventId = None) -> Response:
        """What happens to one machine; the stream ends with it."""
        return _events(name, kind, last_event_id)

    def _events(name: str | None, kinds: list[Kind] | None, last_id: str | None) -> Response:
        wanted = {*(kinds or ("conversion", "lifecycle", "counters")), "lost"}

        def encode(event: Event) -> bytes:
            return sse(event) if event.kind in wanted else b""

        def opened() -> AbstractAsyncContextManager[AsyncIterator[Event]]:
            return _known(fleet.events(name, last_id=last_id))

        return Streaming(opened, encode, media_type="text/event-stream", greeting=_GREETING, keep_alive=_KEEP_ALIVE)

    return routes


@asynccontextmanager
async def _known(inner: AbstractAsyncContextManager[AsyncIterator[Event]]) -> AsyncIterator[AsyncIterator[Event]]:
    """Enter a stream of events, and refuse ids that were never any."""
    async with AsyncExitStack() as stack:
        try:
            events = await stack.enter_async_context(inner)
        except ValueError as error:
            mistake = {"where": "header.Last-Event-ID", "problem": "it is not the id of an event of this stream"}
            detail = f"{mistake['where']}: {mistake['problem']}"
            raise Problem(ProblemType.INVALID_REQUEST, detail, more={"errors": [mistake]}) from error
        yield events
