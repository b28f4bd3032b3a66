"""What the routes stand on."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec
import trio
from fastapi import Request
from fastapi.responses import Response

from kvmd.api.access import CALLER, Caller
from kvmd.api.models import HostFacts
from kvmd.api.problems import Problem, ProblemType
from kvmd.api.server.asgi import DRAINING
from kvmd.api.streams import cancel_when_over
from kvmd.fleet.base import Fleet

T = TypeVar("T")

API_PREFIX = "/v1"


@dataclass(frozen=True, slots=True)
class ServerFigures:
    """What the server says of itself in the metrics.

    Attributes:
        open_connections: now.
        accepted: so far.
        refused: so far, beyond a bound.
    """

    open_connections: int = 0
    accepted: int = 0
    refused: int = 0


@dataclass(slots=True)
class Services:
    """What the routes stand on: what operators may give to guests is looked up at each request, and may change.

    Attributes:
        fleet: the machines.
        host: what the host can do, asked once.
        image_folders: folders whose files an operator may start.
        disk_folders: folders whose files an operator may give to a guest as a disk.
        bridges: names of bridges that an operator may attach guests to.
        namespaces: whether an operator may give a guest a network namespace.
        figures: asks the server about itself.
    """

    fleet: Fleet
    host: HostFacts
    image_folders: Sequence[Path] = ()
    disk_folders: Sequence[Path] = ()
    bridges: Sequence[str] = ()
    namespaces: bool = False
    figures: Callable[[], ServerFigures] = ServerFigures


def caller_of(request: Request) -> Caller:
    """Return who asks: the gate in front of the app has found out."""
    caller: Caller = request.scope["extensions"][CALLER]
    return caller


def json_response(document: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return plain data as JSON: FastAPI would make models of it, and validate them."""
    return Response(msgspec.json.encode(document), status, headers, media_type="application/json")


async def unless_over(request: Request, action: Callable[[], Awaitable[T]]) -> T:
    """Return what ``action`` returns; cancel it where the client goes away or kvmd stops first.

    Raises:
        Problem: ``stopping``, for a client that is gone too, which does not see it.
    """
    error: Exception | None = None
    results: list[T] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cancel_when_over, request.scope, request.receive, nursery.cancel_scope)
        try:
            results.append(await action())
        except Exception as caught:  # noqa: BLE001 - raised again below: a nursery would put it into a group
            error = caught
        nursery.cancel_scope.cancel()
    if error is not None:
        raise error
    if results:
        return results[0]
    why = "kvmd is stopping" if request.scope["extensions"][DRAINING].is_set() else "the client has gone"
    raise Problem(ProblemType.STOPPING, why)
