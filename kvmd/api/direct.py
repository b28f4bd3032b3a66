"""Small GETs, past FastAPI.

FastAPI's way to a function takes as long as all the rest of a small request together (docs/api.md, "Speed"). What is
answered here is what the routes answer, made by the same functions; what is not plainly one of these, such as a HEAD, a
machine that is not there or a query with a mistake, goes on to FastAPI, which has the words for it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

import msgspec
import trio

from kvmd.api.all_counters import all_counters
from kvmd.api.documents import host_document, machine_document, machines_document
from kvmd.api.pages import conversions, memory_map
from kvmd.api.problems import Problem
from kvmd.api.queries import conversions_of_query, memory_map_of_query
from kvmd.api.server.asgi import App, Receive, Scope, Send
from kvmd.api.services import API_PREFIX, Services
from kvmd.errors import KvmdError
from kvmd.fleet.base import Fleet, counters_document

_ONE = f"{API_PREFIX}/machines/"
_JSON = (b"content-type", b"application/json")


async def _machine(fleet: Fleet, name: str) -> object:
    return machine_document(fleet.machine(name))


async def _counters(fleet: Fleet, name: str) -> object:
    return counters_document(await fleet.counters(name))


_OF_ONE: Mapping[str, Callable[[Fleet, str], Awaitable[object]]] = {
    "": _machine,
    "counters": _counters,
    "conversions": conversions,
    "memory/map": memory_map,
}
"""What is answered of one machine, by what follows its name."""

_OF_ONE_BY_QUERY: Mapping[str, Callable[[Fleet, str, bytes], Awaitable[object]]] = {
    "conversions": conversions_of_query,
    "memory/map": memory_map_of_query,
}
"""The same where there is a query: None for one that FastAPI is to answer."""


class Direct:
    """An ASGI app that answers what it knows, and lets another one answer the rest.

    Args:
        app: answers the rest.
        services: what answers stand on.
    """

    def __init__(self, app: App, services: Services) -> None:
        self._app = app
        self._fleet = services.fleet
        host = host_document(services.host)

        async def get_host() -> object:
            return host

        async def get_machines() -> object:
            return machines_document(self._fleet.machines())

        async def get_counters() -> object:
            return await all_counters(self._fleet)

        self._resources: dict[str, Callable[[], Awaitable[object]]] = {
            f"{API_PREFIX}/host": get_host,
            f"{API_PREFIX}/machines": get_machines,
            f"{API_PREFIX}/counters": get_counters,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or pass it on."""
        document = None
        if scope["method"] == "GET":
            document = await self._answer(scope["path"], scope["query_string"])
        if document is None:
            await self._app(scope, receive, send)
            return
        body = msgspec.json.encode(document)
        headers = [(b"content-length", b"%d" % len(body)), _JSON]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _answer(self, path: str, query: bytes) -> object:
        """Return what a resource says, or None where FastAPI has to say it."""
        get = self._resources.get(path)
        if get is not None:
            return None if query else await get()
        if path.startswith(_ONE):
            name, _, part = path[len(_ONE) :].partition("/")
            try:
                if query:
                    asked = _OF_ONE_BY_QUERY.get(part)
                    return None if asked is None else await asked(self._fleet, name, query)
                answer = _OF_ONE.get(part)
                # A path that ends with a slash is another one.
                if answer is not None and (part or not path.endswith("/")):
                    return await answer(self._fleet, name)
            except (KvmdError, Problem):
                await trio.lowlevel.checkpoint()
        return None
