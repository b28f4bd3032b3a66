from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from fastapi.routing import APIRoute

from kvmd.api import models
from kvmd.api.app import make_fastapi
from kvmd.api.problems import ProblemType
from kvmd.api.services import Services
from kvmd.cli.host_report import as_json, networks_json, report_of, without_kvm_json
from kvmd.spec.conversion import ConversionSpec
from kvmd.spec.limits import LimitsSpec
from kvmd.spec.machine import MachineSpec
from tests.api.serving import HOST, serving_api
from tests.api.write_openapi import COMMITTED, document
from tests.fleet.fakes import FakeFleet

DOCS = COMMITTED.parent / "api.md"


def test_the_committed_document_is_the_one_that_is_served() -> None:
    assert COMMITTED.read_text(encoding="utf-8") == document(), "run: python -m tests.api.write_openapi"


async def test_it_is_served(tmp_path: Path) -> None:
    async with serving_api(tmp_path / "s") as api:
        assert (await api.get("/v1/openapi.json")).json == json.loads(COMMITTED.read_text(encoding="utf-8"))


def routes() -> Iterator[APIRoute]:
    app = make_fastapi(Services(fleet=FakeFleet(), host=HOST))
    for route in app.router.routes:
        found = getattr(route, "original_router", None)
        for inner in found.routes if found is not None else [route]:
            if isinstance(inner, APIRoute):
                yield inner


def test_no_endpoint_runs_in_a_worker_thread() -> None:
    endpoints = [route.endpoint for route in routes()]
    assert len(endpoints) > 15
    assert [endpoint for endpoint in endpoints if not inspect.iscoroutinefunction(endpoint)] == []


@pytest.mark.parametrize(
    ("model", "spec"),
    [
        (models.MachineRequest, MachineSpec),
        (models.ConversionRequest, ConversionSpec),
        (models.LimitsRequest, LimitsSpec),
    ],
)
def test_the_api_takes_what_a_machine_s_file_takes(model: type[models.Request], spec: type[msgspec.Struct]) -> None:
    assert set(model.model_fields) == set(spec.__struct_fields__)


def test_the_host_s_facts_are_those_of_kvmd_check() -> None:
    networks = networks_json({"bridges": None, "namespaces": "no CAP_SYS_ADMIN"})
    facts = [found | networks for found in (as_json(report_of(())), without_kvm_json("no device", None))]
    assert set().union(*facts) == set(models.HostFacts.model_fields)
    for found in facts:
        assert models.HostFacts.model_validate(found).usable is True


def test_every_problem_is_documented() -> None:
    text = DOCS.read_text(encoding="utf-8")
    for kind in ProblemType:
        assert f"| `{kind.value[0]}` | {kind.status} |" in text, kind
