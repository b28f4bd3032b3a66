"""The agent, the balloon and the power button of a Linux guest over the API."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from kvmd.guests import GUESTS
from kvmd.spec.machine import MachineSpec
from tests.api.serving import Client, Serving, serving_api

MIB = 1 << 20


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Serving]:
    """An API with a running Linux guest "one" that has all devices, and a payload "two" that has none."""
    async with serving_api(tmp_path / "s") as api:
        linux = {"kernel": GUESTS["hello"].path, "name": "one", "memory": 64 * MIB, "agent": "a", "balloon": True}
        await api.fleet.create(MachineSpec(**linux), owner_uid=0)  # type: ignore[arg-type]
        await api.fleet.create(MachineSpec(image=GUESTS["hello"].path, name="two"), owner_uid=0)
        for name in ("one", "two"):
            await api.fleet.start(name)
        yield api


async def attach(client: Client) -> None:
    await client.stream.send_all(
        b"GET /v1/machines/one/agent HTTP/1.1\r\nHost: k\r\nConnection: Upgrade\r\nUpgrade: kvmd-agent\r\n\r\n"
    )
    got = b""
    while not got.endswith(b"\r\n\r\n"):
        got += await client.stream.receive_some(1000)
    assert got.startswith(b"HTTP/1.1 101")
    assert b"upgrade: kvmd-agent" in got


async def test_bytes_go_to_the_agent_and_back(api: Serving) -> None:
    async with api.connect() as client:
        await attach(client)
        await client.stream.send_all(b'{"execute":"guest-ping"}\n')
        assert await client.stream.receive_some(1000) == b'{"EXECUTE":"GUEST-PING"}\n'
        refused = await api.request("GET", "/v1/machines/one/agent", headers=UPGRADE)
        assert (refused.status, refused.problem) == (409, "device-in-use")
        # One that has said all still listens.
        await client.stream.send_all(b"last")
        client.stream.socket.shutdown(socket.SHUT_WR)
        assert await client.stream.receive_some(1000) == b"LAST"
        api.fleet.guest("one").end()
        assert await client.ended()


UPGRADE = {"connection": "upgrade", "upgrade": "kvmd-agent"}


async def test_a_client_that_hangs_up_on_a_deaf_agent_makes_room(api: Serving) -> None:
    async with api.connect() as client:
        await attach(client)
        await client.stream.send_all(b"deaf")
        agent = api.fleet.guest("one").agent
        assert agent is not None
        while not agent.deaf:  # noqa: ASYNC110 - nobody tells
            await trio.sleep(0.001)
        await client.stream.send_all(b"never read")
    with trio.fail_after(20):
        while api.fleet.guest("one").agent is not None:  # noqa: ASYNC110 - nobody tells
            await trio.sleep(0.001)


async def test_the_balloon_is_shown_and_told(api: Serving) -> None:
    shown = (await api.get("/v1/machines/one/balloon")).json
    assert shown == {"target": 0, "actual": 0, "given_back": 0, "held": 16 * MIB}
    told = await api.request("PUT", "/v1/machines/one/balloon", {"target": "8M"})
    assert told.json == {"target": 8 * MIB, "actual": 4 * MIB, "given_back": 4 * MIB, "held": 16 * MIB}
    for target in (100, 64 * MIB, "999999999999999T"):
        refused = await api.request("PUT", "/v1/machines/one/balloon", {"target": target})
        assert (refused.status, refused.problem) == (422, "invalid-request")
        assert refused.json["detail"].startswith("body.target: ")
        assert refused.json["errors"][0]["where"] == "body.target"
    assert (await api.get("/v1/machines/one/balloon")).json["target"] == 8 * MIB


async def test_the_balloons_figures_are_among_the_metrics_of_those_that_have_one(
    api: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    await api.request("PUT", "/v1/machines/one/balloon", {"target": "8M"})
    asked: list[str] = []
    monkeypatch.setattr(api.fleet, "balloon", asked.append)  # which the counters make needless
    lines = (await api.get("/v1/metrics")).body.decode().splitlines()
    assert [line for line in lines if line.startswith("kvmd_balloon_")] == [
        f'kvmd_balloon_target_bytes{{machine="one"}} {8 * MIB}',
        f'kvmd_balloon_actual_bytes{{machine="one"}} {4 * MIB}',
        f'kvmd_balloon_held_bytes{{machine="one"}} {16 * MIB}',
        f'kvmd_balloon_given_back_bytes_total{{machine="one"}} {4 * MIB}',
    ]
    kinds = dict(line.removeprefix("# TYPE kvmd_balloon_").split() for line in lines if "TYPE kvmd_balloon_" in line)
    assert kinds == dict.fromkeys(["target_bytes", "actual_bytes", "held_bytes"], "gauge") | {
        "given_back_bytes_total": "counter"
    }
    assert asked == []


async def test_the_power_button(api: Serving) -> None:
    pressed = await api.post("/v1/machines/one/power-button")
    assert (pressed.status, pressed.json["end"]["reason"]) == (200, "guest-power-off")
    assert (await api.post("/v1/machines/one/power-button")).problem == "wrong-state"


@pytest.mark.parametrize(
    ("method", "path", "body", "what"),
    [
        ("GET", "agent", None, "no port for an agent"),
        ("GET", "balloon", None, "no balloon"),
        ("PUT", "balloon", {"target": 4096}, "no balloon"),
        ("POST", "power-button", None, "no power button"),
    ],
)
async def test_a_machine_without_the_device_says_so(
    api: Serving, method: str, path: str, body: object, what: str
) -> None:
    headers = UPGRADE if path == "agent" else None
    refused = await api.request(method, f"/v1/machines/two/{path}", body, headers)
    assert (refused.status, refused.problem) == (404, "no-such-device")
    assert what in refused.json["detail"]
