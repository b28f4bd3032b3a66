"""A machine's console and log: output as a stream, input as a request, and both over an upgraded connection."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from kvmd.api.openapi import problems
from kvmd.api.problems import Problem, ProblemType
from kvmd.api.routes.query import StrictRoute
from kvmd.api.server.asgi import UPGRADE
from kvmd.api.services import Services, caller_of, unless_over
from kvmd.api.streams import ConsoleConnection, Streaming

PROTOCOL = "kvmd-console"
"""What a client names in its Upgrade field."""

_UNKNOWN = problems(ProblemType.UNKNOWN_MACHINE)
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
        offered = str(request.scope["extensions"].get(UPGRADE, ""))
        if PROTOCOL not in (name.strip().lower() for name in offered.split(",")):
            raise Problem(
                ProblemType.UPGRADE_REQUIRED,
                f"ask with Connection: upgrade and Upgrade: {PROTOCOL}",
                headers=((b"upgrade", PROTOCOL.encode()), (b"connection", b"upgrade")),
            )
        return ConsoleConnection(partial(fleet.console, name), PROTOCOL)

    @routes.get(
        "/console/output",
        response_class=Response,
        responses={
            **_UNKNOWN,
            200: {"description": "what the guest prints", "content": {"application/octet-stream": {}}},
        },
        operation_id="follow_console",
    )
    async def follow_console(name: str) -> Response:
        """What the machine prints, from as far back as it is kept up to its end."""
        return Streaming(partial(fleet.console_output, name), bytes, media_type="application/octet-stream")

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
            200: {"description": "lines of JSON", "content": {"application/x-ndjson": {}}},
        },
        operation_id="follow_log",
    )
    async def follow_log(name: str) -> Response:
        """What the machine's process logs, from as far back as it is kept up to its end."""
        return Streaming(partial(fleet.log_output, name), bytes, media_type="application/x-ndjson")

    return routes
