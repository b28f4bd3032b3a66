from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.api.serving import Serving, serving_api


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Serving]:
    async with serving_api(tmp_path / "kvmd.sock") as serving:
        yield serving


async def test_there_are_no_machines_at_first(api: Serving) -> None:
    answer = await api.get("/v1/machines")
    assert answer.status == 200
    assert answer.json == {"machines": []}


async def test_a_machine_is_created_listed_and_shown(api: Serving) -> None:
    created = await api.post("/v1/machines", {"image": "builtin:hello", "name": "one", "memory": "16M", "vcpus": 2})
    assert created.status == 201
    assert created.headers["location"] == "/v1/machines/one"
    assert created.json["state"] == "created"
    assert created.json["spec"]["image"] == "builtin:hello"
    assert created.json["spec"]["memory"] == 16 << 20
    assert (await api.get("/v1/machines")).json == {"machines": [created.json]}
    assert (await api.get("/v1/machines/one")).json == created.json
