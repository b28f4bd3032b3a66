"""The daemon and its host."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import Response

from kvmd.api.documents import host_document
from kvmd.api.models import Host
from kvmd.api.openapi import problems
from kvmd.api.routes.query import StrictRoute
from kvmd.api.services import Services, json_response


def router(services: Services) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(prefix="/host", tags=["host"], route_class=StrictRoute)
    answer = host_document(services.host)

    @routes.get("", response_model=Host, responses=problems(), operation_id="get_host")
    async def get_host() -> Response:
        """What kvmd and its host can do, as it was when the daemon started."""
        return json_response(answer)

    return routes
