"""What every resource answers, over the real server."""

from __future__ import annotations

import base64
import json
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from kvmd.api.queries import CONVERSIONS, MEMORY_MAP, conversions_of_query
from kvmd.api.server.limits import Limits
from kvmd.errors import MachineSilent
from kvmd.fleet.base import Counters
from kvmd.ranges import GpaRange, PageState
from kvmd.units import MIB, PAGE_SIZE
from tests.api.serving import Client, Serving, serving_api

DOCUMENT = Path(__file__).parents[2] / "docs" / "openapi.json"
HELLO = {"image": "builtin:hello", "name": "one", "memory": "1M"}


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Serving]:
    async with serving_api(tmp_path / "s", limits=Limits(drain_seconds=1)) as serving:
        yield serving


@pytest.fixture
async def one(api: Serving) -> Serving:
    """A machine of the name "one" that runs."""
    assert (await api.post("/v1/machines", HELLO)).status == 201
    assert (await api.post("/v1/machines/one/start")).status == 200
    return api


# -- machines ----------------------------------------------------------------------------------------------------------


async def test_host(api: Serving) -> None:
    answer = await api.get("/v1/host")
    assert answer.json["host"]["tripwires"] == ["hole"]
    assert answer.json["version"]


async def test_a_machine_s_life(api: Serving) -> None:
    created = await api.post("/v1/machines", HELLO)
    assert (created.status, created.json["state"]) == (201, "created")
    for action, state in (("start", "running"), ("pause", "paused"), ("resume", "running"), ("kill", "stopped")):
        answer = await api.post(f"/v1/machines/one/{action}")
        assert (answer.status, answer.json["state"]) == (200, state)
    assert answer.json["end"]["reason"] == "killed"
    deleted = await api.request("DELETE", "/v1/machines/one")
    assert (deleted.status, deleted.body) == (204, b"")
    assert (await api.request("DELETE", "/v1/machines/one")).problem == "unknown-machine"


async def test_polled_answers_are_those_of_the_documented_way(one: Serving) -> None:
    # Behind the gate, kvmd.api.direct answers; with an empty query, FastAPI does (kvmd/api/direct.py).
    guest = one.fleet.guest("one")
    guest.pinned = GpaRange(0, PAGE_SIZE)
    for _ in range(3):
        guest.convert(PAGE_SIZE)
    of_one = ("", "/counters", "/conversions", "/memory/map")
    for path in ("/v1/host", "/v1/machines", "/v1/counters", *(f"/v1/machines/one{part}" for part in of_one)):
        direct, documented = await one.get(path), await one.get(f"{path}?&")
        assert (direct.status, direct.body) == (200, documented.body)
        assert direct.headers["content-type"] == documented.headers["content-type"] == "application/json"
    for part in of_one:
        assert (await one.get(f"/v1/machines/two{part}")).problem == "unknown-machine"
        assert (await one.get(f"/v1/machines/one{part}/")).problem == "not-found"


QUERIES = {
    "conversions": [
        "limit=1",
        "since=1&limit=1",
        "last=1",
        "since=2&last=2",
        "to=shared",
        "cause=explicit&outcome=converted&vcpu=0",
        "gpa=0x1000",
        "gpa=4096&size=8192",
        "since=18446744073709551616",
        "since=-1",
        "since=+1",
        "since=%201",
        "since=1.0",
        "since=",
        "limit=0",
        "limit=4097",
        "limit=1&last=1",
        "size=1",
        "gpa=x",
        "to=Shared",
        "vcpu=one",
        "typo=1",
        "LIMIT=1",
        "limit",
        "limit=1;last=1",
        "%6cimit=1",
        "limit=%EF%BC%91",
        "limit=1&" + "&".join(["since=0"] * 20),
    ],
    "memory/map": ["limit=1", "from=0x1000&limit=1", "from=4096", "from=-1", "limit=x", "limit=65537", "size=1"],
}


@pytest.mark.parametrize(("part", "query"), [(part, query) for part, of_it in QUERIES.items() for query in of_it])
async def test_queries_are_answered_as_in_the_documented_way(one: Serving, part: str, query: str) -> None:
    guest = one.fleet.guest("one")
    for page in (1, 2, 1):
        guest.convert(page * PAGE_SIZE)
    path = f"/v1/machines/one/{part}?{query}"
    # The first parameter once more: FastAPI takes the last of two, and kvmd.api.direct neither.
    direct, documented = await one.get(path), await one.get(f"{path}&{query.partition('&')[0]}")
    assert (direct.status, direct.body) == (documented.status, documented.body)
    assert direct.headers["content-type"] == documented.headers["content-type"]
    assert (await one.get(f"/v1/machines/two/{part}?{query}")).status >= 400


def test_parameters_that_are_answered_before_fastapi_are_those_that_are_documented() -> None:
    paths = json.loads(DOCUMENT.read_text(encoding="utf-8"))["paths"]
    for part, parameters in (("conversions", CONVERSIONS), ("memory/map", MEMORY_MAP)):
        documented = paths[f"/v1/machines/{{name}}/{part}"]["get"]["parameters"]
        assert {each["name"] for each in documented if each["in"] == "query"} == parameters.names


async def test_small_queries_do_not_reach_fastapi(one: Serving) -> None:
    assert CONVERSIONS.parse(b"limit=1&to=shared&gpa=0x1000") == {"limit": 1, "to": "shared", "gpa": "0x1000"}
    assert MEMORY_MAP.parse(b"from=0x1000&limit=2") == {"from": "0x1000", "limit": 2}
    for query in (b"limit=1&limit=1", b"limit=", b"&", b"limit", b"limit=x", b"typo=1"):
        assert CONVERSIONS.parse(query) is None
    assert await conversions_of_query(one.fleet, "one", b"limit=1") is not None


@pytest.mark.parametrize("action", ["start", "resume"])
async def test_the_wrong_state_is_told_with_both(one: Serving, action: str) -> None:
    answer = await one.post(f"/v1/machines/one/{action}")
    assert (answer.status, answer.problem) == (409, "wrong-state")
    assert answer.json["found"] == "running"
    assert answer.json["needed"] in {"created", "paused"}
    assert (await one.request("DELETE", "/v1/machines/one")).problem == "wrong-state"


async def test_names_are_made_up_where_none_is_given(api: Serving) -> None:
    names = [(await api.post("/v1/machines", {"image": "builtin:hello"})).json["name"] for _ in range(3)]
    assert names == ["hello", "hello-2", "hello-3"]


async def test_bounds_of_conversions_are_shown_as_they_were_asked_for(api: Serving) -> None:
    bounds = {"chunk": "1M", "no_progress_limit": 2, "max_ranges": 3, "implicit": "deny", "rate": 4}
    answer = await api.post("/v1/machines", {"image": "builtin:hello", "conversion": bounds})
    assert answer.json["spec"]["conversion"] == {**bounds, "chunk": 1 << 20}
    answer = await api.post("/v1/machines", {"image": "builtin:hello"})
    assert answer.json["spec"]["conversion"]["rate"] is None


async def test_two_clients_that_race_get_one_winner(api: Serving) -> None:
    async def race(request: Any) -> list[int]:
        statuses: list[int] = []

        async def run() -> None:
            statuses.append((await request()).status)

        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(run)
        return sorted(statuses)

    assert await race(lambda: api.post("/v1/machines", HELLO)) == [201] + [409] * 7
    assert await race(lambda: api.post("/v1/machines/one/start")) == [200] + [409] * 7
    assert await race(lambda: api.post("/v1/machines/one/kill")) == [200] + [409] * 7
    assert await race(lambda: api.request("DELETE", "/v1/machines/one")) == [204] + [404] * 7


async def test_waiting_for_a_state(one: Serving) -> None:
    answer = await one.get("/v1/machines/one/wait?state=running")
    assert answer.json["reached"] is True
    answer = await one.get("/v1/machines/one/wait?state=stopped&timeout=0.01")
    assert (answer.json["reached"], answer.json["machine"]["state"]) == (False, "running")
    async with one.connect() as client:
        await client.begin("GET", "/v1/machines/one/wait?state=stopped&state=paused")
        await trio.testing.wait_all_tasks_blocked(0.02)
        one.fleet.guest("one").end()
        answer = await client.answer()
        assert (answer.json["reached"], answer.json["machine"]["state"]) == (True, "stopped")


async def test_waiting_ends_with_its_machine_and_with_the_daemon(one: Serving) -> None:
    await one.post("/v1/machines", {**HELLO, "name": "two"})
    async with one.connect() as first, one.connect() as second:
        await first.begin("GET", "/v1/machines/two/wait?state=stopped&timeout=3600")
        await second.begin("GET", "/v1/machines/one/wait?state=stopped&timeout=3600")
        await trio.testing.wait_all_tasks_blocked(0.02)
        one.server.stop()
        assert (await first.answer()).problem == "stopping"
        assert (await second.answer()).problem == "stopping"


async def test_a_stop_that_takes_too_long_is_told(one: Serving) -> None:
    one.fleet.guest("one").stubborn = True
    answer = await one.post("/v1/machines/one/stop?timeout=0.01")
    assert (answer.status, answer.json["reached"], answer.json["machine"]["state"]) == (200, False, "running")
    one.fleet.guest("one").stubborn = False
    answer = await one.post("/v1/machines/one/stop")
    assert (answer.json["reached"], answer.json["machine"]["end"]["reason"]) == (True, "operator")


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "problem", "detail"),
    [
        (b"{", "bad-request", "the content is not JSON"),
        (b"\xff\xfe", "bad-request", ""),
        (b"[" * 60_000, "bad-request", ""),
        (b"9" * 5000, "bad-request", ""),
        (b"[]", "invalid-request", "body: "),
        (b"null", "invalid-request", "body: "),
        (b"{}", "invalid-spec", "image is missing: expected the path of an ELF file"),
        ({"image": "builtin:hello", "cpus": 2}, "invalid-request", "body.cpus: Extra inputs are not permitted"),
        ({"image": "builtin:hello", "conversion": {"x": 1}}, "invalid-request", "body.conversion.x: "),
        ({"image": "builtin:hello", "conversion": {"rate": 0}}, "invalid-request", "body.conversion.rate: "),
        ({"image": "builtin:hello", "vcpus": "2"}, "invalid-request", "body.vcpus: "),
        ({"image": "builtin:hello", "vcpus": True}, "invalid-request", "body.vcpus: "),
        ({"image": "builtin:hello", "vcpus": 10**400}, "invalid-request", "body.vcpus: "),
        ({"image": "builtin:hello", "arguments": [1 << 64]}, "invalid-request", "body.arguments.0: "),
        ({"image": "builtin:hello", "arguments": [-1]}, "invalid-request", "body.arguments.0: "),
        ({"image": "builtin:hello", "memory": "64 bananas"}, "invalid-request", "body.memory"),
        ({"image": "builtin:hello", "memory": 4097}, "invalid-spec", "memory: 4097 is not possible"),
        ({"image": "builtin:hello", "memory": "999999999999T"}, "invalid-spec", "memory: "),
        ({"image": "builtin:hello", "name": "a/b"}, "invalid-request", "body.name: "),
        ({"image": "builtin:hello", "name": "a\n"}, "invalid-request", "body.name: "),
        ({"image": "builtin:hello", "name": ".."}, "invalid-request", "body.name: "),
        ({"image": "builtin:hello", "name": "\ud800"}, "invalid-request", "body.name: "),
        ({"image": "builtin:hallo"}, "invalid-spec", "image: there is no built-in guest 'hallo' (did you mean hello?)"),
        ({"image": "/etc/passwd"}, "invalid-image", "cannot open the image /etc/passwd in an allowed folder (none)"),
        ({"image": "a\0b"}, "invalid-spec", "image: "),
        ({"image": "\ud800", "name": "x"}, "invalid-request", "body.image: "),
        ({"image": ""}, "invalid-request", "body.image: "),
    ],
)  # fmt: skip
async def test_bad_machines_are_refused(api: Serving, body: Any, problem: str, detail: str) -> None:
    answer = await api.post("/v1/machines", body)
    assert answer.problem == problem, answer.json
    assert answer.json["detail"].startswith(detail), answer.json
    assert api.fleet.machines() == []


async def test_content_of_another_type_is_refused(api: Serving) -> None:
    answer = await api.request("POST", "/v1/machines", b"image=x", {"content-type": "text/plain"})
    assert answer.problem in {"unsupported-media-type", "invalid-request"}


async def test_content_that_is_too_large_is_refused(api: Serving) -> None:
    answer = await api.post("/v1/machines", b" " * 100_000)
    assert answer.problem == "content-too-large"


@pytest.mark.parametrize(
    "name", ["..", ".", "%2e%2e", "%00", "a%0ab", "%F0%9F%92%A9", "a%20b", "x" * 4000, "A", "one%2Fstart", "%25"]
)
async def test_names_that_no_machine_has(api: Serving, name: str) -> None:
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/start"), ("GET", "/events"), ("GET", "/memory/map")):
        answer = await api.request(method, f"/v1/machines/{name}{path}")
        assert answer.problem in {"unknown-machine", "not-found"}, (method, path, answer.body)


@pytest.mark.parametrize(
    ("method", "target", "status", "problem"),
    [
        ("GET", "/", 404, "not-found"),
        ("GET", "/v2/machines", 404, "not-found"),
        ("GET", "/v1/machines/", 404, "not-found"),
        ("PUT", "/v1/machines", 405, "method-not-allowed"),
        ("TRACE", "/v1/machines", 405, "method-not-allowed"),
        ("FROB", "/v1/host", 405, "method-not-allowed"),
        ("GET", "/v1/machines/one/start", 405, "method-not-allowed"),
        ("GET", "/v1/machines?x=1", 422, "invalid-request"),
        ("GET", "/v1/machines/one/wait", 422, "invalid-request"),
        ("GET", "/v1/machines/one/wait?state=gone", 422, "invalid-request"),
        ("GET", "/v1/machines/one/wait?state=paused&timeout=nan", 422, "invalid-request"),
        ("GET", "/v1/machines/one/wait?state=paused&timeout=1e9", 422, "invalid-request"),
        ("GET", "/v1/machines/one/conversions?since=-1", 422, "invalid-request"),
        ("GET", f"/v1/machines/one/conversions?since={'9' * 5000}", 422, "invalid-request"),
        ("GET", "/v1/machines/one/conversions?limit=5000", 422, "invalid-request"),
        ("GET", "/v1/machines/one/conversions?outcome=fine", 422, "invalid-request"),
        ("GET", "/v1/machines/one/conversions?direction=shared", 422, "invalid-request"),
        ("GET", "/v1/machines/one/memory?gpa=0x0&size=0", 422, "invalid-request"),
        ("GET", "/v1/machines/one/memory?gpa=0x0&size=9999999", 422, "invalid-request"),
        ("GET", "/v1/machines/one/memory?gpa=x&size=1", 422, "invalid-request"),
        ("GET", "/v1/machines/one/memory?gpa=-1&size=1", 422, "invalid-request"),
        ("GET", "/v1/machines/one/memory?gpa=0x100000&size=1", 416, "outside-memory"),
        ("GET", "/v1/machines/one/memory?gpa=0xffffffffffffffff&size=1048576", 416, "outside-memory"),
        ("GET", "/v1/machines/one/memory?gpa=0x0&size=1", 409, "private-memory"),
        ("GET", "/v1/machines/one/console", 426, "upgrade-required"),
    ],
)  # fmt: skip
async def test_requests_that_are_refused(one: Serving, method: str, target: str, status: int, problem: str) -> None:
    answer = await one.request(method, target)
    assert (answer.status, answer.problem) == (status, problem), answer.body
    if status == 405:
        assert answer.headers["allow"]
    if status == 422:
        assert answer.json["errors"][0]["where"].startswith("query")


async def test_a_stopped_machine_has_no_memory(one: Serving) -> None:
    one.fleet.guest("one").end()
    for path in ("memory/map", "memory?gpa=0&size=1"):
        assert (await one.get(f"/v1/machines/one/{path}")).problem == "wrong-state"


# -- memory and conversions --------------------------------------------------------------------------------------------


async def test_the_memory_map_is_ranges_and_can_be_paged(one: Serving) -> None:
    guest = one.fleet.guest("one")
    for page in (1, 3):
        guest.convert(page * PAGE_SIZE)
    answer = await one.get("/v1/machines/one/memory/map")
    ranges = answer.json["ranges"]
    assert [(entry["gpa"], entry["size"], entry["state"]) for entry in ranges] == [
        ("0x0", 4096, "private"),
        ("0x1000", 4096, "shared"),
        ("0x2000", 4096, "private"),
        ("0x3000", 4096, "shared"),
        ("0x4000", MIB - 4 * PAGE_SIZE, "private"),
    ]
    assert answer.json["next"] is None
    paged: list[object] = []
    following: str | None = "0x0"
    while following is not None:
        page = (await one.get(f"/v1/machines/one/memory/map?from={following}&limit=2")).json
        paged += page["ranges"]
        following = page["next"]
    assert paged == ranges


async def test_the_memory_map_says_what_never_converts(one: Serving) -> None:
    guest = one.fleet.guest("one")
    guest.pinned = GpaRange(PAGE_SIZE, 3 * PAGE_SIZE)
    guest.convert(4 * PAGE_SIZE)
    ranges = (await one.get("/v1/machines/one/memory/map")).json["ranges"]
    assert [(entry["gpa"], entry["state"], entry["pinned"]) for entry in ranges] == [
        ("0x0", "private", False),
        ("0x1000", "private", True),
        ("0x3000", "private", False),
        ("0x4000", "shared", False),
        ("0x5000", "private", False),
    ]
    assert sum(entry["size"] for entry in ranges) == MIB


async def test_the_last_conversions(one: Serving) -> None:
    guest = one.fleet.guest("one")
    base = "/v1/machines/one/conversions"
    assert (await one.get(f"{base}?last=2")).json == {"conversions": [], "next": 0, "more": False, "lost": 0}
    for number in range(10):
        guest.convert((number % 3) * PAGE_SIZE, to=PageState.SHARED if number % 2 else PageState.PRIVATE)

    async def sequences(query: str) -> tuple[list[int], int]:
        answer = (await one.get(f"{base}?{query}")).json
        assert not answer["more"]
        return [record["sequence"] for record in answer["conversions"]], answer["next"]

    assert await sequences("last=3") == ([8, 9, 10], 10)
    assert await sequences("last=99") == (list(range(1, 11)), 10)
    assert await sequences("last=99&since=7") == ([8, 9, 10], 10)
    assert await sequences("last=2&since=10") == ([], 10)
    assert await sequences("last=2&since=99") == ([], 99)
    assert await sequences("last=2&to=shared") == ([8, 10], 10)
    assert await sequences("last=2&gpa=0x1001") == ([5, 8], 10)
    assert await sequences("last=2&gpa=4097&size=4096") == ([8, 9], 10)
    guest.records = guest.records[5:]
    assert await sequences("last=99") == ([6, 7, 8, 9, 10], 10)
    assert (await one.get(f"{base}?last=2&limit=3")).problem == "invalid-request"
    assert (await one.get(f"{base}?size=3")).problem == "invalid-request"


async def test_the_last_conversions_that_pass_a_filter_are_looked_for_within_bounds(one: Serving) -> None:
    guest = one.fleet.guest("one")
    guest.convert(0)
    record = guest.records[0]
    guest.records = [{**record, "sequence": number, "vcpu": int(number == 1)} for number in range(1, 20_001)]
    guest.converted = 20_000
    answer = (await one.get("/v1/machines/one/conversions?last=1&vcpu=1")).json
    assert (answer["conversions"], answer["more"]) == ([], True)
    guest.records = guest.records[:16_000]
    guest.converted = 16_000
    answer = (await one.get("/v1/machines/one/conversions?last=1&vcpu=1")).json
    assert ([found["sequence"] for found in answer["conversions"]], answer["more"]) == ([1], False)


async def test_the_counters_of_all_machines(one: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    await one.post("/v1/machines", {**HELLO, "name": "two"})
    one.fleet.guest("one").convert(0x3000)
    machines = (await one.get("/v1/counters")).json["machines"]
    assert [(entry["name"], entry["state"]) for entry in machines] == [("one", "running"), ("two", "created")]
    assert machines[0]["counters"] == (await one.get("/v1/machines/one/counters")).json
    assert machines[0]["counters"]["hottest"] == [{"gpa": "0x3000", "size": 4096, "count": 1, "overcount": 0}]

    async def silent(_name: str) -> Counters:
        raise MachineSilent("machine one did not answer within 15 s: kill it, or try again")

    monkeypatch.setattr(one.fleet, "counters", silent)
    assert [entry["counters"] for entry in (await one.get("/v1/counters")).json["machines"]] == [None, None]
    answer = await one.get("/v1/machines/one/counters")
    assert (answer.status, answer.problem) == (504, "machine-silent")


async def test_shared_memory_can_be_read(one: Serving) -> None:
    one.fleet.guest("one").convert(0x2000, size_bytes=2 * PAGE_SIZE)
    answer = await one.get("/v1/machines/one/memory?gpa=0x2ffe&size=4")
    assert (answer.status, answer.body) == (200, bytes(4))
    assert answer.headers["content-type"] == "application/octet-stream"
    answer = await one.get("/v1/machines/one/memory?gpa=8192&size=9000")
    assert (answer.problem, answer.json["gpa"]) == ("private-memory", "0x4000")


async def test_conversions_are_paged_and_filtered(one: Serving) -> None:
    guest = one.fleet.guest("one")
    for number in range(10):
        guest.convert((number % 3) * PAGE_SIZE, to=PageState.SHARED if number % 2 else PageState.PRIVATE)
    base = "/v1/machines/one/conversions"
    answer = (await one.get(f"{base}?limit=4")).json
    assert [record["sequence"] for record in answer["conversions"]] == [1, 2, 3, 4]
    assert (answer["next"], answer["more"], answer["lost"]) == (4, True, 0)
    answer = (await one.get(f"{base}?since=4")).json
    assert [record["sequence"] for record in answer["conversions"]] == [5, 6, 7, 8, 9, 10]
    assert (answer["next"], answer["more"]) == (10, False)
    answer = (await one.get(f"{base}?since=10")).json
    assert (answer["conversions"], answer["next"], answer["more"]) == ([], 10, False)
    answer = (await one.get(f"{base}?to=shared&cause=implicit&outcome=converted&vcpu=0&limit=3")).json
    assert [record["sequence"] for record in answer["conversions"]] == [2, 4, 6]
    assert answer["next"] in {6, 7}
    assert answer["more"]
    assert (await one.get(f"{base}?vcpu=1")).json["conversions"] == []
    guest.records = guest.records[5:]
    assert (await one.get(f"{base}?since=2")).json["lost"] == 3


async def test_counters_and_metrics(one: Serving) -> None:
    one.fleet.guest("one").convert(0)
    counters = (await one.get("/v1/machines/one/counters")).json
    assert counters["requests"] == [{"cause": "implicit", "to": "shared", "outcome": "converted", "count": 1}]
    assert counters["waiting_us"] == {"p50": 1.0, "p90": 1.0, "p99": 1.0, "max": 1.0}
    answer = await one.get("/v1/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    lines = answer.body.decode().splitlines()
    assert 'kvmd_machines{state="running"} 1' in lines
    assert 'kvmd_conversion_requests_total{machine="one",cause="implicit",to="shared",outcome="converted"} 1' in lines
    assert f'kvmd_memory_bytes{{machine="one",state="private"}} {MIB - PAGE_SIZE}' in lines
    assert 'kvmd_conversion_held_back_seconds_total{machine="one"} 0.25' in lines


# -- streams -----------------------------------------------------------------------------------------------------------


async def next_events(client: Client, count: int) -> list[dict[str, Any]]:
    """Return the next events of a stream."""
    found: list[dict[str, Any]] = []
    text = ""
    while len(found) < count:
        text += (await client.data()).decode()
        *whole, text = text.split("\n\n")
        for block in whole:
            fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
            if "data" in fields:
                found.append({**fields, "data": json.loads(fields["data"])})
    return found


async def follow(client: Client, target: str, last_id: str | None = None) -> None:
    await client.begin("GET", target, headers={} if last_id is None else {"last-event-id": last_id})
    head = await client.head()
    assert head.status_code == 200, head
    assert (b"content-type", b"text/event-stream; charset=utf-8") in head.headers
    await client.until(b"retry:")


async def test_events_come_and_go_on_where_the_reader_left(one: Serving) -> None:
    guest = one.fleet.guest("one")
    async with one.connect() as client:
        await follow(client, "/v1/events")
        guest.convert(0)
        (event,) = await next_events(client, 1)
        assert (event["event"], event["data"]["machine"], event["data"]["gpa"]) == ("conversion", "one", "0x0")
    guest.convert(PAGE_SIZE)
    guest.convert(2 * PAGE_SIZE)
    async with one.connect() as client:
        await follow(client, "/v1/machines/one/events", event["id"])
        missed = await next_events(client, 2)
        assert [event["data"]["gpa"] for event in missed] == ["0x1000", "0x2000"]


async def test_losses_are_told(one: Serving) -> None:
    guest = one.fleet.guest("one")
    for _ in range(2000):
        guest.convert(0)
    async with one.connect() as client:
        await follow(client, "/v1/events?kind=conversion", "1")
        lost, first = (await next_events(client, 2))[:2]
        assert lost["event"] == "lost"
        assert lost["data"]["lost"] > 900
        assert first["event"] == "conversion"


async def test_conversions_are_chosen_and_the_reader_s_place_moves_on_all_the_same(one: Serving) -> None:
    guest = one.fleet.guest("one")
    async with one.connect() as client:
        await follow(client, "/v1/events?kind=conversion&to=shared&gpa=0x2000&size=8192&vcpu=0&cause=implicit")
        for page in range(6):
            guest.convert(page * PAGE_SIZE)
            guest.convert(page * PAGE_SIZE, to=PageState.PRIVATE)
        one.fleet.count("one")
        found = await next_events(client, 2)
        assert [(event["data"]["gpa"], event["data"]["to"]) for event in found] == [
            ("0x2000", "shared"),
            ("0x3000", "shared"),
        ]
    # The first of those left out moved the place; a reader that saw only that one comes back behind it.
    async with one.connect() as client:
        await client.begin("GET", "/v1/machines/one/events?kind=lifecycle")
        greeting = await client.data_after_head()
        place = int(greeting.split(b"\n")[0].removeprefix(b"id: "))
        guest.convert(0)
        assert await client.until(b"\n\n") == b"id: %d\n\n" % (place + 1)


async def test_a_reader_that_saw_no_event_comes_back_to_where_it_was(one: Serving) -> None:
    for target in ("/v1/events", "/v1/machines/one/events"):
        async with one.connect() as client:
            await client.begin("GET", target)
            greeting = await client.data_after_head()
        one.fleet.guest("one").convert(0)
        place = greeting.split(b"\n")[0].removeprefix(b"id: ").decode()
        async with one.connect() as client:
            await follow(client, target, place)
            (event,) = await next_events(client, 1)
            assert event["event"] == "conversion"


async def test_counters_in_the_stream_are_those_of_the_resource(one: Serving) -> None:
    one.fleet.guest("one").convert(0x5000)
    async with one.connect() as client:
        await follow(client, "/v1/events?kind=counters")
        one.fleet.count("one")
        (event,) = await next_events(client, 1)
    assert event["data"].pop("machine") == "one"
    assert event["data"] == (await one.get("/v1/machines/one/counters")).json
    assert event["data"]["hottest"][0]["gpa"] == "0x5000"


async def test_kinds_are_chosen_and_one_machine_s_stream_ends_with_it(one: Serving) -> None:
    guest = one.fleet.guest("one")
    async with one.connect() as client:
        await follow(client, "/v1/machines/one/events?kind=lifecycle")
        guest.convert(0)
        guest.end()
        (event,) = await next_events(client, 1)
        assert (event["event"], event["data"]["reason"]) == ("lifecycle", "guest-exit")
        assert await client.data() == b""
        assert (await client.get("/v1/machines")).status == 200  # on the same connection


async def test_an_id_that_was_never_any_is_refused(one: Serving) -> None:
    for target in ("events", "machines/one/events", "machines/one/console/output", "machines/one/log"):
        for last_id in ("garbage", "1 2", "-1"):
            answer = await one.request("GET", f"/v1/{target}", headers={"last-event-id": last_id})
            assert (answer.status, answer.problem) == (422, "unknown-event"), target
    answer = await one.request("GET", "/v1/events", headers={"last-event-id": "999999"})
    assert (answer.status, answer.problem) == (422, "unknown-event")


async def test_a_silent_stream_is_kept_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmd.api.streams.KEEP_ALIVE_SECONDS", 0.01)
    async with serving_api(tmp_path / "s") as api, api.connect() as client:
        await follow(client, "/v1/events")
        await client.until(b": still here\n\n: still here\n\n")


async def test_a_stream_ends_properly_when_the_daemon_stops(one: Serving) -> None:
    async with one.connect() as client:
        await follow(client, "/v1/events")
        one.server.stop()
        assert await client.data() == b""
        assert await client.ended()


async def test_a_stalled_reader_slows_nobody(one: Serving) -> None:
    guest = one.fleet.guest("one")
    async with one.connect() as stalled, one.connect() as client:
        await stalled.begin("GET", "/v1/events")
        await follow(client, "/v1/events")
        seen = 0
        for _ in range(50):
            for _ in range(100):
                guest.convert(0)
            seen += len(await next_events(client, 100))
        assert seen == 5000
        one.server.stop()
        with trio.fail_after(10):
            await one.over.wait()


# -- consoles ----------------------------------------------------------------------------------------------------------


async def test_console_output_and_log_are_streams(one: Serving) -> None:
    guest = one.fleet.guest("one")
    guest.print(b"early \x00\xff")
    guest.write_log("ready")
    async with one.connect() as output, one.connect() as log:
        await output.begin("GET", "/v1/machines/one/console/output")
        await log.begin("GET", "/v1/machines/one/log")
        assert (await output.head()).status_code == (await log.head()).status_code == 200
        await output.until(b"early \x00\xff")
        guest.print(b"late")
        await output.until(b"late")
        assert json.loads(await log.until(b"\n"))["event"] == "ready"
        guest.end()
        assert await output.data() == b""
        assert await log.data() == b""


async def test_output_from_a_place_and_what_there_is_now(one: Serving) -> None:
    guest = one.fleet.guest("one")
    guest.print(b"0123456789")
    base = "/v1/machines/one/console/output"
    for query, body in (("", b"0123456789"), ("&from=4", b"456789"), ("&from=10", b""), ("&from=99", b"")):
        answer = await one.get(f"{base}?follow=false{query}")
        assert (answer.status, answer.body) == (200, body)
    for query in ("from=-1", "from=x", "follow=yes", "follow=", f"from={1 << 63}"):
        assert (await one.get(f"{base}?{query}")).problem == "invalid-request"
    guest.write_log("ready")
    assert json.loads((await one.get("/v1/machines/one/log?follow=false")).body)["event"] == "ready"


async def test_output_as_events_can_be_taken_up_again_and_says_how_it_ended(one: Serving) -> None:
    guest = one.fleet.guest("one")
    target = "/v1/machines/one/console/output"
    accept = {"accept": "text/event-stream"}
    guest.print(b"early \x00\xff")
    async with one.connect() as client:
        await client.begin("GET", target, headers=accept)
        await client.head()
        await client.until(b"retry:")
        (first,) = await next_events(client, 1)
    assert (first["event"], first["id"]) == ("output", "8")
    assert base64.b64decode(first["data"].pop("data")) == b"early \x00\xff"
    assert first["data"] == {"machine": "one", "from": 0, "dropped": 0}
    guest.print(b"late")
    async with one.connect() as client:
        await client.begin("GET", target, headers={**accept, "last-event-id": first["id"]})
        await client.head()
        await client.until(b"retry:")
        (second,) = await next_events(client, 1)
        assert (base64.b64decode(second["data"]["data"]), second["data"]["from"]) == (b"late", 8)
        guest.end(status=3)
        (end,) = await next_events(client, 1)
        assert (end["event"], end["id"]) == ("end", "12")
        assert (end["data"]["ended"], end["data"]["status"]) == (True, 3)
        assert await client.data() == b""
    guest.console.start, guest.console.kept = 10, guest.console.kept[10:]
    answer = await one.request("GET", f"{target}?from=4", headers=accept)
    assert b'"from":10,"dropped":6' in answer.body


async def test_output_that_ends_with_the_daemon_or_with_what_there_is_does_not_say_that_the_machine_did(
    one: Serving,
) -> None:
    accept = {"accept": "text/html, text/event-stream;q=0.5"}
    answer = await one.request("GET", "/v1/machines/one/console/output?follow=false", headers=accept)
    assert answer.body.endswith(b'event: end\ndata: {"machine":"one","ended":false}\n\n')
    async with one.connect() as client:
        await client.begin("GET", "/v1/machines/one/log", headers=accept)
        await client.head()
        await client.until(b"retry:")
        one.server.stop()
        assert await client.data() == b""


async def test_output_of_a_machine_that_is_deleted_meanwhile_has_ended(one: Serving) -> None:
    async with one.connect() as client:
        await client.begin("GET", "/v1/machines/one/console/output", headers={"accept": "text/event-stream"})
        await client.head()
        await client.until(b"retry:")
        guest = one.fleet.guest("one")
        guest.end()
        one.fleet._guests.clear()
        (end,) = await next_events(client, 1)
        assert (end["event"], end["data"]) == ("end", {"machine": "one", "ended": True})


async def test_silent_output_is_kept_alive(one: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmd.api.streams.KEEP_ALIVE_SECONDS", 0.01)
    async with one.connect() as client:
        await client.begin("GET", "/v1/machines/one/console/output", headers={"accept": "text/event-stream"})
        await client.head()
        await client.until(b": still here\n\n: still here\n\n")


async def test_console_input_is_taken(one: Serving) -> None:
    headers = {"content-type": "application/octet-stream"}
    answer = await one.request("POST", "/v1/machines/one/console/input", b"hi\xff", headers)
    assert answer.status == 204
    assert one.fleet.guest("one").take_input() == b"hi\xff"
    answer = await one.request("POST", "/v1/machines/one/console/input", b"{}", {"content-type": "text/plain"})
    assert answer.problem == "unsupported-media-type"
    one.fleet.guest("one").end()
    answer = await one.request("POST", "/v1/machines/one/console/input", b"hi", headers)
    assert answer.problem == "wrong-state"


async def test_input_that_the_guest_does_not_take_ends_with_the_client(one: Serving) -> None:
    headers = {"content-type": "application/octet-stream"}
    async with one.connect() as client:
        await client.begin("POST", "/v1/machines/one/console/input", b"x" * 10_000, headers)
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert one.server.open_connections == 1
    while one.server.open_connections:  # noqa: ASYNC110 - nobody tells
        await trio.sleep(0.001)


async def attach(client: Client) -> bytes:
    head = b"GET /v1/machines/one/console HTTP/1.1\r\nHost: k\r\nConnection: Upgrade\r\nUpgrade: kvmd-console\r\n\r\n"
    await client.stream.send_all(head)
    got = b""
    while b"\r\n\r\n" not in got:
        got += await client.stream.receive_some(1000)
    head, _, rest = got.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 101")
    assert b"upgrade: kvmd-console" in head
    return rest


async def test_an_attached_console_carries_both_ways_up_to_the_machine_s_end(one: Serving) -> None:
    guest = one.fleet.guest("one")
    guest.print(b"hello")
    async with one.connect() as client:
        got = await attach(client)
        while got != b"hello":
            got += await client.stream.receive_some(1000)
        await client.stream.send_all(b"typed\x03")
        while not guest.input:  # noqa: ASYNC110 - nobody tells
            await trio.sleep(0.001)
        assert guest.take_input() == b"typed\x03"
        client.stream.socket.shutdown(socket.SHUT_WR)
        guest.print(b"still here")
        assert await client.stream.receive_some(1000) == b"still here"
        guest.end()
        assert await client.ended()


@pytest.mark.parametrize("end", ["client", "daemon"])
async def test_an_attached_console_ends_with_its_client_and_with_the_daemon(one: Serving, end: str) -> None:
    async with one.connect() as client:
        await attach(client)
        if end == "daemon":
            one.server.stop()
            assert await client.ended()
    with trio.fail_after(10):
        while one.server.open_connections:  # noqa: ASYNC110 - nobody tells
            await trio.sleep(0.001)


async def test_who_asked_is_the_owner(api: Serving) -> None:
    assert (await api.post("/v1/machines", HELLO)).json["owner_uid"] == os.geteuid()
