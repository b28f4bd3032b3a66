"""The whole API as one ASGI app: the gate, the routes, and how errors are told."""

from __future__ import annotations

from kvmd import __version__
from kvmd.api import errors
from kvmd.api.access import AccessRules, Gate
from kvmd.api.direct import Direct
from kvmd.api.openapi import DocumentedApi
from kvmd.api.routes import console, counters, events, guest_devices, guest_memory, host, machines, metrics
from kvmd.api.services import API_PREFIX, Services


def make_app(services: Services, rules: AccessRules) -> Gate:
    """Return the app that the server serves."""
    return Gate(Direct(make_fastapi(services), services), rules)


def make_fastapi(services: Services) -> DocumentedApi:
    """Return the app without its gate."""
    app = DocumentedApi(
        title="kvmd",
        version=__version__,
        openapi_url=f"{API_PREFIX}/openapi.json",
        # Their pages load scripts from elsewhere, and nobody has a browser on a Unix socket.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    for module in (host, machines, guest_devices, guest_memory, counters, events, console, metrics):
        app.include_router(module.router(services), prefix=API_PREFIX)
    errors.install(app)
    return app
