"""The OpenAPI document: FastAPI's, with problems where they belong.

``docs/openapi.json`` is the committed copy; ``tests/api/test_openapi.py`` keeps the two equal.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from kvmd.api.models import ProblemDocument
from kvmd.api.problems import MEDIA_TYPE, ProblemType

_REFERENCE = "#/components/schemas/{model}"


class DocumentedApi(FastAPI):
    """A FastAPI app whose document knows the model of problems, which no route returns."""

    def openapi(self) -> dict[str, Any]:
        """Return the document; made once."""
        made = self.openapi_schema is None
        document = super().openapi()
        if made:
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            problem = ProblemDocument.model_json_schema(ref_template=_REFERENCE)
            schemas.update(problem.pop("$defs", {}))
            schemas["ProblemDocument"] = problem
        return document


def problems(*kinds: ProblemType) -> dict[int | str, dict[str, Any]]:
    """Return what a route says of the problems that it answers with; some can happen to any, and bugs to all."""
    always = (ProblemType.BAD_REQUEST, ProblemType.FORBIDDEN, ProblemType.INVALID_REQUEST)
    by_status: dict[int, list[str]] = {}
    for kind in {*always, *kinds}:
        by_status.setdefault(kind.status, []).append(f"`{kind.value[0]}`")
    content = {MEDIA_TYPE.decode(): {"schema": {"$ref": _REFERENCE.format(model="ProblemDocument")}}}
    found: dict[int | str, dict[str, Any]] = {
        status: {"description": ", ".join(sorted(names)), "content": content}
        for status, names in sorted(by_status.items())
    }
    return {**found, "default": {"description": "any other problem", "content": content}}
