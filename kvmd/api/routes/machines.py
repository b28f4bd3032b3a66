"""Machines: create, list, get, delete, and the actions that change their state."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import trio
from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from kvmd.api.documents import machine_document, machines_document, waited_document
from kvmd.api.images import check_networks, check_passed, opened_files, opened_image
from kvmd.api.models import Machine, MachineRequest, Machines, Waited
from kvmd.api.openapi import problems
from kvmd.api.problems import ProblemType
from kvmd.api.routes.query import StrictRoute
from kvmd.api.server.asgi import PASSED_FILE
from kvmd.api.services import API_PREFIX, Services, caller_of, json_response, unless_over
from kvmd.fleet.base import MachineInfo, MachineState
from kvmd.spec.machine import spec_of

WAIT_LIMIT_SECONDS = 3600

Seconds = Annotated[float, Query(ge=0, le=WAIT_LIMIT_SECONDS, description="how long to wait at most, in seconds")]
States = Annotated[list[MachineState], Query(min_length=1, max_length=8, description="any of these will do")]

_UNKNOWN = problems(ProblemType.UNKNOWN_MACHINE)
_ACTING_PROBLEMS = (ProblemType.UNKNOWN_MACHINE, ProblemType.WRONG_STATE, ProblemType.BACKEND_FAILED)
_ACTING = problems(*_ACTING_PROBLEMS)


def router(services: Services) -> APIRouter:  # noqa: C901 - one small function for each method of a resource
    """Return the routes."""
    fleet = services.fleet
    routes = APIRouter(prefix="/machines", tags=["machines"], route_class=StrictRoute)

    @routes.get("", response_model=Machines, responses=problems(), operation_id="list_machines")
    async def list_machines() -> Response:
        """All machines, by name."""
        return json_response(machines_document(fleet.machines()))

    @routes.post(
        "",
        status_code=201,
        response_model=Machine,
        responses=problems(
            ProblemType.MACHINE_EXISTS,
            ProblemType.CONTENT_TOO_LARGE,
            ProblemType.INVALID_SPEC,
            ProblemType.INVALID_IMAGE,
            ProblemType.HOST_LACKS,
            ProblemType.BACKEND_FAILED,
        ),
        operation_id="create_machine",
    )
    async def create_machine(request: Request, wanted: MachineRequest) -> Response:
        """Create a machine: a process with memory and vCPUs that has not run yet.

        Without a name it gets its image's, with a number after it where that is taken. Of two clients that want the
        same name, one gets it and the other `machine-exists`.
        """
        info = await _create(request, wanted)
        headers = {"location": f"{API_PREFIX}/machines/{info.name}"}
        return json_response(machine_document(info), 201, headers)

    async def _create(request: Request, wanted: MachineRequest) -> MachineInfo:
        document = wanted.document()
        create = partial(fleet.create, owner_uid=caller_of(request).uid, any_name=wanted.name is None)
        passed: int | None = request.scope["extensions"].get(PASSED_FILE)
        if wanted.kernel is not None or wanted.image is None:
            return await _create_linux(create, document, wanted.kernel or "", passed)
        if passed is not None:
            document["image"] = check_passed(passed, wanted.image)
            return await create(spec_of(document, base=Path()), files=[passed])
        # Everything is checked before a file is opened.
        spec = spec_of(document, base=Path("/"))
        with opened_image(wanted.image, services.image_folders) as image:
            return await create(spec, files=[] if image is None else [image])

    async def _create_linux(
        create: Callable[..., Awaitable[MachineInfo]], document: dict[str, object], kernel: str, passed: int | None
    ) -> MachineInfo:
        if passed is not None and kernel:
            document["kernel"] = check_passed(passed, kernel)
        spec = spec_of(document, base=Path())
        check_networks(spec, services.bridges, namespaces=services.namespaces)
        with opened_files(spec, services.image_folders, services.disk_folders, passed=passed) as files:
            return await create(spec, files=files)

    @routes.get("/{name}", response_model=Machine, responses=_UNKNOWN, operation_id="get_machine")
    async def get_machine(name: str) -> Response:
        """One machine."""
        return json_response(machine_document(fleet.machine(name)))

    @routes.delete("/{name}", status_code=204, responses=_ACTING, operation_id="delete_machine")
    async def delete_machine(name: str) -> Response:
        """Forget a machine that is created or stopped; a created one's process is ended."""
        await fleet.delete(name)
        return Response(status_code=204)

    @routes.get("/{name}/wait", response_model=Waited, responses=_UNKNOWN, operation_id="wait_for_machine")
    async def wait_for_machine(request: Request, name: str, state: States, timeout: Seconds = 30) -> Response:  # noqa: ASYNC109 - a field of the request
        """Wait until the machine is in one of the states, or the time is over."""
        info, reached = await _wait(request, name, frozenset(state), timeout)
        return json_response(waited_document(info, reached=reached))

    async def _wait(
        request: Request, name: str, states: frozenset[MachineState], seconds: float
    ) -> tuple[MachineInfo, bool]:
        async def wait() -> MachineInfo | None:
            with trio.move_on_after(seconds):
                return await fleet.wait(name, states)
            return None

        info = await unless_over(request, wait)
        return (fleet.machine(name), False) if info is None else (info, True)

    def action(
        name: str, act: Callable[[str], Awaitable[MachineInfo]], summary: str, description: str, *more: ProblemType
    ) -> None:
        async def endpoint(name: str) -> Response:
            return json_response(machine_document(await act(name)))

        routes.post(
            f"/{{name}}/{name}",
            response_model=Machine,
            responses=problems(*_ACTING_PROBLEMS, *more),
            operation_id=f"{name.replace('-', '_')}_machine",
            summary=summary,
            description=description,
        )(endpoint)

    action("start", fleet.start, "Start Machine", "Run a machine that is created.")
    action(
        "pause",
        fleet.pause,
        "Pause Machine",
        "Take a running machine's vCPUs out of the guest; devices rest.",
    )
    action("resume", fleet.resume, "Resume Machine", "Let a paused machine's vCPUs in again.")
    action(
        "power-button",
        fleet.press_power_button,
        "Press Power Button",
        "Ask a running Linux guest to shut down. What it does about it is its own business: wait for `stopped`.",
        ProblemType.NO_SUCH_DEVICE,
    )
    action("kill", fleet.kill, "Kill Machine", "End a machine's process at once, unless it is stopped.")

    @routes.post(
        "/{name}/stop",
        response_model=Waited,
        responses=_ACTING,
        operation_id="stop_machine",
    )
    async def stop_machine(request: Request, name: str, timeout: Seconds = 30) -> Response:  # noqa: ASYNC109 - as above
        """Ask a running or paused machine to stop, and wait until it has, or the time is over."""

        async def stop() -> MachineInfo | None:
            with trio.move_on_after(timeout):
                return await fleet.stop(name)
            return None

        info = await unless_over(request, stop)
        return json_response(waited_document(info or fleet.machine(name), reached=info is not None))

    return routes
