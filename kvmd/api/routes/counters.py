"""What all machines did so far, in one answer: what a monitor polls."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import Response

from kvmd.api.all_counters import all_counters
from kvmd.api.models import AllCounters
from kvmd.api.openapi import problems
from kvmd.api.routes.query import StrictRoute
from kvmd.api.services import Services, json_response


def router(services: Services) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(prefix="/counters", tags=["machines"], route_class=StrictRoute)

    @routes.get("", response_model=AllCounters, responses=problems(), operation_id="get_all_counters")
    async def get_all_counters() -> Response:
        """The counters of all machines, asked at once."""
        return json_response(await all_counters(services.fleet))

    return routes
