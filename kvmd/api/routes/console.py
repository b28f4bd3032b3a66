"""A machine's console and log: output as a stream, input as a request, and both over an upgraded connection."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import Response

from kvmd.api.encoders import EVENT_STREAM, OutputEvents, RawOutput
from kvmd.api.openapi import problems
from kvmd.api.problems import Problem, ProblemType
from kvmd.api.routes.events import unknown_event
from kvmd.api.routes.query import StrictRoute
from kvmd.api.server.asgi import UPGRADE
from kvmd.api.services import Services, caller_of, unless_over
from kvmd.api.streams import ConsoleConnection, Streaming
from kvmd.fleet.base import Fleet, OutputPart

PROTOCOL = "kvmd-console"
"""What a client names in its Upgrade field."""

Place = Annotated[
    int, Query(alias="from", ge=0, lt=1 << 63, description="the first byte, counted from the output's first")
]
Follow = Annotated[Literal["true", "false"], Query(description="go on with what comes, to the machine's end")]
LastEventId = Annotated[
    str | None,
    Header(alias="Last-Event-ID", max_length=64, description="in place of `from`: where the last event ended"),
]
Output = Callable[..., AbstractAsyncContextManager[AsyncIterator[OutputPart]]]

_PLACE_DIGITS = 18
_UNKNOWN = problems(ProblemType.UNKNOWN_MACHINE, ProblemType.UNKNOWN_EVENT)
_INPUT: dict[str, Any] = {
    "requestBody": {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
}


def router(services: Services) -> APIRouter:
    """Return the routes."""
    fleet = services.fleet
    routes = APIRouter(prefix="/machines/{name}", tags=["console"], route_class=StrictRoute)

    @routes.get(
        "/console",
        response_class=Response,
        status_code=101,
        responses=problems(ProblemType.UNKNOWN_MACHINE, ProblemType.UPGRADE_REQUIRED),
        operation_id="attach_console",
    )
    async def attach_console(request: Request, name: str) -> Response:
        """The console, both ways: ask with `Connection: upgrade` and `Upgrade: kvmd-console`."""
        caller_of(request).need_operator("type into consoles")
        fleet.machine(name)
        need_upgrade(request, PROTOCOL)
        return ConsoleConnection(partial(fleet.console, name), PROTOCOL)

    @routes.get(
        "/console/output",
        response_class=Response,
        responses={
            **_UNKNOWN,
            200: {
                "description": "what the guest prints",
                "content": {"application/octet-stream": {}, EVENT_STREAM: {}},
            },
        },
        operation_id="follow_console",
    )
    async def follow_console(
        request: Request, name: str, from_: Place = 0, follow: Follow = "true", last_event_id: LastEventId = None
    ) -> Response:
        """What the machine prints: bytes, or, where `Accept` names `text/event-stream`, events."""
        opened = partial(fleet.console_output, name, follow=follow == "true")
        return _output(request, fleet, name, opened, _start(from_, last_event_id))

    @routes.post(
        "/console/input",
        status_code=204,
        responses=problems(
            ProblemType.UNKNOWN_MACHINE,
            ProblemType.WRONG_STATE,
            ProblemType.UNSUPPORTED_MEDIA_TYPE,
            ProblemType.CONTENT_TOO_LARGE,
        ),
        operation_id="type_into_console",
        openapi_extra=_INPUT,
    )
    async def type_into_console(request: Request, name: str) -> Response:
        """Give the guest input; answered once the guest has taken it."""
        fleet.machine(name)
        if request.headers.get("content-type", "application/octet-stream") != "application/octet-stream":
            raise Problem(ProblemType.UNSUPPORTED_MEDIA_TYPE, "input is application/octet-stream")
        data = await request.body()

        async def send() -> None:
            async with fleet.console(name) as console:
                await console.send(data)

        await unless_over(request, send)
        return Response(status_code=204)

    @routes.get(
        "/log",
        response_class=Response,
        responses={
            **_UNKNOWN,
            200: {"description": "lines of JSON", "content": {"application/x-ndjson": {}, EVENT_STREAM: {}}},
        },
        operation_id="follow_log",
    )
    async def follow_log(
        request: Request, name: str, from_: Place = 0, follow: Follow = "true", last_event_id: LastEventId = None
    ) -> Response:
        """What the machine's process logs: lines of JSON, or, where `Accept` names `text/event-stream`, events."""
        opened = partial(fleet.log_output, name, follow=follow == "true")
        return _output(request, fleet, name, opened, _start(from_, last_event_id), raw="application/x-ndjson")

    return routes


def need_upgrade(request: Request, protocol: str) -> None:
    """Refuse a client that does not offer to go on with the protocol.

    Raises:
        Problem: ``upgrade-required``.
    """
    offered = str(request.scope["extensions"].get(UPGRADE, ""))
    if protocol not in (name.strip().lower() for name in offered.split(",")):
        raise Problem(
            ProblemType.UPGRADE_REQUIRED,
            f"ask with Connection: upgrade and Upgrade: {protocol}",
            headers=((b"upgrade", protocol.encode()), (b"connection", b"upgrade")),
        )


def _output(
    request: Request, fleet: Fleet, name: str, opened: Output, start: int, *, raw: str = "application/octet-stream"
) -> Response:
    output = partial(opened, start=start)
    if not _wants_events(request):
        return Streaming(output, lambda _: RawOutput(), media_type=raw)
    return Streaming(output, lambda _: OutputEvents(fleet, name, start), media_type=EVENT_STREAM)


def _wants_events(request: Request) -> bool:
    """Tell whether the client names the media type of events; one that takes anything is given plain bytes."""
    accepted = request.headers.get("accept", "").lower().split(",")
    return any(each.partition(";")[0].strip() == EVENT_STREAM for each in accepted)


def _start(start: int, last_id: str | None) -> int:
    if last_id is None:
        return start
    if not (last_id.isascii() and last_id.isdigit()) or len(last_id) > _PLACE_DIGITS:
        raise unknown_event("it was never the id of a piece of output")
    return int(last_id)
