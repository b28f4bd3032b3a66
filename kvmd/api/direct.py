"""The two GETs that clients poll, past FastAPI.

FastAPI's way to a function takes as long as all the rest of a small request together (docs/api.md, "Speed"). What is
answered here is answered by the same functions; everything that is not plainly one of these goes on to FastAPI.
"""

from __future__ import annotations

from kvmd.api.models import Machine, Machines
from kvmd.api.server.asgi import App, Receive, Scope, Send
from kvmd.api.services import API_PREFIX
from kvmd.errors import UnknownMachine
from kvmd.fleet.base import Fleet

_ALL = f"{API_PREFIX}/machines"
_ONE = f"{API_PREFIX}/machines/"


def all_machines(fleet: Fleet) -> bytes:
    """Return the list of machines as JSON."""
    machines = Machines.model_construct(machines=[Machine.of(info) for info in fleet.machines()])
    return machines.__pydantic_serializer__.to_json(machines)


def one_machine(fleet: Fleet, name: str) -> bytes:
    """Return a machine as JSON.

    Raises:
        UnknownMachine: there is none.
    """
    machine = Machine.of(fleet.machine(name))
    return machine.__pydantic_serializer__.to_json(machine)


class Direct:
    """An ASGI app that answers what it knows, and lets another one answer the rest.

    Args:
        app: answers the rest.
        fleet: the machines.
    """

    def __init__(self, app: App, fleet: Fleet) -> None:
        self._app = app
        self._fleet = fleet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or pass it on."""
        body = self._answer(scope)
        if body is None:
            await self._app(scope, receive, send)
            return
        headers = [(b"content-length", b"%d" % len(body)), (b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _answer(self, scope: Scope) -> bytes | None:
        path: str = scope["path"]
        if scope["method"] != "GET" or scope["query_string"]:
            return None
        if path == _ALL:
            return all_machines(self._fleet)
        if path.startswith(_ONE) and "/" not in path[len(_ONE) :]:
            try:
                return one_machine(self._fleet, path[len(_ONE) :])
            except UnknownMachine:
                return None
        return None
