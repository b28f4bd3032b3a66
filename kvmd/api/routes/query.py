"""Routes that refuse query parameters that they do not know: a filter with a typo would show everything."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any
from urllib.parse import parse_qsl

from fastapi import Request
from fastapi.dependencies.models import Dependant
from fastapi.responses import Response
from fastapi.routing import APIRoute

from kvmd.api.problems import Problem, ProblemType


class StrictRoute(APIRoute):
    """A route that takes no other query parameters than those it declares."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return FastAPI's handler, behind a look at the query."""
        handle = super().get_route_handler()
        known = _query_names(self.dependant)

        async def handle_if_known(request: Request) -> Response:
            query: bytes = request.scope["query_string"]
            if query:
                given = {name for name, _ in parse_qsl(query.decode("latin-1"), keep_blank_values=True)}
                unknown = sorted(given - known)
                if unknown:
                    where = f"query.{unknown[0]}"
                    where = where if where.isprintable() else repr(where)
                    takes = ", ".join(sorted(known)) or "none"
                    mistake = {"where": where[:200], "problem": f"unknown parameter; this resource takes {takes}"}
                    detail = f"{mistake['where']}: {mistake['problem']}"
                    raise Problem(ProblemType.INVALID_REQUEST, detail, more={"errors": [mistake]})
            return await handle(request)

        return handle_if_known


def _query_names(dependant: Dependant) -> frozenset[str]:
    """Return the query parameters that a route, or what it depends on, declares."""
    own = frozenset(parameter.alias for parameter in dependant.query_params)
    return own.union(*map(_query_names, dependant.dependencies))
