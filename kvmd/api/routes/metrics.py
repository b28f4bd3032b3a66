"""Figures for Prometheus, in its text format (version 0.0.4)."""

from __future__ import annotations

from collections.abc import Iterable

from fastapi import APIRouter
from fastapi.responses import Response

from kvmd.api.all_counters import counters_of_all
from kvmd.api.openapi import problems
from kvmd.api.routes.query import StrictRoute
from kvmd.api.services import ServerFigures, Services
from kvmd.fleet.base import MACHINE_STATES, Counters, MachineInfo

_QUANTILES = ("0.5", "0.9", "0.99", "1")

_BALLOON = (
    ("target_bytes", "gauge", "target_bytes", "What a guest with a balloon is asked to do without."),
    ("actual_bytes", "gauge", "actual_bytes", "What it says that it does without."),
    ("held_bytes", "gauge", "held_bytes", "What its memory takes up of the host's now."),
    (
        "given_back_bytes_total",
        "counter",
        "given_back_bytes",
        "What the host has taken back: of the balloon, and of pages that were reported as free.",
    ),
)
"""Of each figure of a balloon: its name, kind, attribute of ``kvmd.fleet.base.Balloon``, and meaning."""

Sample = tuple[str, dict[str, str], float]
"""The name, the labels and the value of one line."""


def router(services: Services) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(prefix="/metrics", tags=["metrics"], route_class=StrictRoute)

    @routes.get(
        "",
        response_class=Response,
        responses={**problems(), 200: {"description": "figures", "content": {"text/plain": {}}}},
        operation_id="get_metrics",
    )
    async def get_metrics() -> Response:
        """Figures of all machines, and of the API itself, for Prometheus."""
        machines = services.fleet.machines()
        counters = await counters_of_all(services.fleet, machines)
        return Response(
            render(machines, counters, services.figures()), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    return routes


def render(machines: Iterable[MachineInfo], counters: dict[str, Counters], figures: ServerFigures) -> bytes:
    """Return all figures as text."""
    machines = list(machines)
    lines: list[str] = []

    def family(name: str, kind: str, what: str, samples: Iterable[Sample]) -> None:
        lines.extend((f"# HELP {name} {what}", f"# TYPE {name} {kind}"))
        lines.extend(f"{sample}{_labels(labels)} {value:.17g}" for sample, labels, value in samples)

    name = "kvmd_machines"
    states: list[str] = [info.state for info in machines]
    family(name, "gauge", "Machines by state.", [(name, {"state": s}, states.count(s)) for s in MACHINE_STATES])
    name = "kvmd_machines_silent"
    family(
        name, "gauge", "Machines that did not say their counters in time.", [(name, {}, len(machines) - len(counters))]
    )
    name = "kvmd_conversion_requests_total"
    requests = [
        (name, {"machine": machine, "cause": cause, "to": to, "outcome": outcome}, count)
        for machine, found in sorted(counters.items())
        for (cause, to, outcome), count in sorted(found.requests.items())
    ]
    family(name, "counter", "Answered requests for conversions.", requests)
    name = "kvmd_memory_bytes"
    memory = [
        (name, {"machine": machine, "state": state}, size)
        for machine, found in sorted(counters.items())
        for state, size in (("private", found.private_bytes), ("shared", found.shared_bytes))
    ]
    family(name, "gauge", "Guest memory by state.", memory)
    for step in ("waiting", "applying", "discarding"):
        name = f"kvmd_conversion_{step}_seconds"
        latencies = [
            (name, {"machine": machine, "quantile": quantile}, microseconds / 1e6)
            for machine, found in sorted(counters.items())
            for quantile, microseconds in zip(_QUANTILES, getattr(found, f"{step}_us"), strict=True)
        ]
        family(name, "gauge", f"How long conversions took, {step}; quantile 1 is the maximum.", latencies)
    name = "kvmd_conversion_held_back_seconds_total"
    held_back = [(name, {"machine": machine}, found.held_back_us / 1e6) for machine, found in sorted(counters.items())]
    family(name, "counter", "Time that vCPUs were kept out of the guest by conversion.rate.", held_back)
    name = "kvmd_conversion_records_lost_total"
    lost = [(name, {"machine": machine}, found.lost) for machine, found in sorted(counters.items())]
    family(name, "counter", "Records dropped before they were counted.", lost)
    balloons = [(machine, found.balloon) for machine, found in sorted(counters.items()) if found.balloon is not None]
    for figure, kind, attribute, what in _BALLOON:
        name = f"kvmd_balloon_{figure}"
        sizes: list[Sample] = [(name, {"machine": machine}, getattr(found, attribute)) for machine, found in balloons]
        family(name, kind, what, sizes)
    name = "kvmd_api_connections"
    family(name, "gauge", "Open connections.", [(name, {}, figures.open_connections)])
    name = "kvmd_api_connections_total"
    family(name, "counter", "Connections so far.", [(name, {}, figures.accepted)])
    name = "kvmd_api_connections_refused_total"
    family(name, "counter", "Connections refused since there were too many.", [(name, {}, figures.refused)])
    return ("\n".join(lines) + "\n").encode()


def _labels(labels: dict[str, str]) -> str:
    """Return the labels; machines' names need no escapes, and kvmd's own words neither."""
    return "{" + ",".join(f'{key}="{value}"' for key, value in labels.items()) + "}" if labels else ""
