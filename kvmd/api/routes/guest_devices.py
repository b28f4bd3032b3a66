"""What a Linux guest's devices offer the host: an agent in the guest, and a balloon."""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter, Request
from fastapi.responses import Response

from kvmd.api.documents import balloon_document
from kvmd.api.models import Balloon, BalloonRequest
from kvmd.api.openapi import problems
from kvmd.api.problems import Problem, ProblemType
from kvmd.api.routes.console import need_upgrade
from kvmd.api.routes.query import StrictRoute
from kvmd.api.services import Services, caller_of, json_response
from kvmd.api.streams import ConsoleConnection
from kvmd.units import parse_size

PROTOCOL = "kvmd-agent"
"""What a client names in its Upgrade field."""

_DEVICE = problems(ProblemType.UNKNOWN_MACHINE, ProblemType.NO_SUCH_DEVICE, ProblemType.WRONG_STATE)


def router(services: Services) -> APIRouter:
    """Return the routes."""
    fleet = services.fleet
    routes = APIRouter(prefix="/machines/{name}", tags=["devices"], route_class=StrictRoute)

    @routes.get(
        "/agent",
        response_class=Response,
        status_code=101,
        responses=problems(
            ProblemType.UNKNOWN_MACHINE,
            ProblemType.NO_SUCH_DEVICE,
            ProblemType.DEVICE_IN_USE,
            ProblemType.WRONG_STATE,
            ProblemType.UPGRADE_REQUIRED,
        ),
        operation_id="attach_agent",
    )
    async def attach_agent(request: Request, name: str) -> Response:
        """The agent in the guest, both ways: ask with `Connection: upgrade` and `Upgrade: kvmd-agent`.

        One client at a time. What it sends waits until a program in the guest has the port open.
        """
        caller_of(request).need_operator("talk to agents")
        fleet.machine(name)
        need_upgrade(request, PROTOCOL)
        return ConsoleConnection(partial(fleet.agent, name), PROTOCOL)

    @routes.get("/balloon", response_model=Balloon, responses=_DEVICE, operation_id="get_balloon")
    async def get_balloon(name: str) -> Response:
        """What memory the guest does without."""
        return json_response(balloon_document(await fleet.balloon(name)))

    @routes.put("/balloon", response_model=Balloon, responses=_DEVICE, operation_id="set_balloon")
    async def set_balloon(name: str, wanted: BalloonRequest) -> Response:
        """Ask the guest to do without so much memory. It takes its time, and may do without less: `actual` says."""
        target = wanted.target if isinstance(wanted.target, int) else parse_size(wanted.target)
        memory = fleet.machine(name).spec.memory
        try:
            if target >= memory:
                raise ValueError(f"target: {target} is not a number of whole pages below the {memory} of memory")  # noqa: TRY301 - told like the machine's own refusal
            return json_response(balloon_document(await fleet.set_balloon(name, target)))
        except ValueError as error:
            mistake = {"where": "body.target", "problem": str(error).removeprefix("target: ")}
            raise Problem(ProblemType.INVALID_REQUEST, f"body.{error}", more={"errors": [mistake]}) from error

    return routes
