from __future__ import annotations

import grp
import os
import socket
import stat
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio

from kvmd.api.control import ControlApi
from kvmd.daemon_config import ApiConfig, DaemonConfig
from kvmd.errors import ConfigError
from tests.api.serving import Client
from tests.fleet.fakes import FakeFleet

HOST = {"usable": False, "problem": "no /dev/kvm"}
GROUP = grp.getgrgid(os.getegid()).gr_name


def config_in(folder: Path, *, viewers: str = GROUP) -> DaemonConfig:
    api = ApiConfig(
        socket=str(folder / "s"),
        operators=GROUP,
        viewers=viewers,
        viewers_socket=str(folder / "v"),
        drain_seconds=1,
        connections=10,
        connections_per_user=10,
    )
    return DaemonConfig(api=api)


async def get(path: Path, target: str) -> bytes:
    stream = await trio.open_unix_socket(path)
    assert isinstance(stream, trio.SocketStream)
    async with stream:
        answer = await Client(stream).get(target)
        assert answer.status == 200
        return answer.body


async def test_it_listens_where_its_configuration_says(tmp_path: Path) -> None:
    api = ControlApi(config_in(tmp_path), FakeFleet(), HOST)
    async with trio.open_nursery() as nursery:
        await nursery.start(api.serve)
        for name in ("s", "v"):
            found = (tmp_path / name).stat()
            assert (stat.S_IMODE(found.st_mode), found.st_gid) == (0o660, os.getegid())
            assert b"no /dev/kvm" in await get(tmp_path / name, "/v1/host")
        assert b"\nkvmd_api_connections_total 3\n" in await get(tmp_path / "s", "/v1/metrics")
        api.stop()
    assert not (tmp_path / "s").exists()
    assert not (tmp_path / "v").exists()


async def test_without_viewers_there_is_one_socket(tmp_path: Path) -> None:
    api = ControlApi(config_in(tmp_path, viewers=""), FakeFleet(), HOST)
    async with trio.open_nursery() as nursery:
        await nursery.start(api.serve)
        assert (tmp_path / "s").exists()
        assert not (tmp_path / "v").exists()
        api.stop()


async def test_a_socket_that_was_given_is_served_and_left(tmp_path: Path) -> None:
    path = tmp_path / "given"
    with trio.socket.socket(socket.AF_UNIX) as listener:
        await listener.bind(os.fspath(path))
        listener.listen()
        api = ControlApi(config_in(tmp_path), FakeFleet(), HOST)
        async with trio.open_nursery() as nursery:
            await nursery.start(api.serve, [listener])
            assert b"machines" in await get(path, "/v1/machines")
            assert not (tmp_path / "s").exists()
            api.stop()
    assert path.exists()


def test_a_group_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"api\.viewers: there is no group"):
        ControlApi(config_in(tmp_path, viewers="no-such-group-at-all"), FakeFleet(), HOST)


async def test_it_answers_its_own_daemon_also_where_clients_have_all_connections(tmp_path: Path) -> None:
    api = ControlApi(config_in(tmp_path), FakeFleet(), HOST)
    assert not await api.answers()
    async with trio.open_nursery() as nursery:
        await nursery.start(api.serve)
        assert await api.answers()
        async with AsyncExitStack() as stack:
            for _ in range(10):
                client = await stack.enter_async_context(await trio.open_unix_socket(tmp_path / "s"))
                await client.send_all(b"GET /v1/host HTTP/1.1\r\nHost: k\r\n\r\n")
                assert (await client.receive_some()).startswith(b"HTTP/1.1 200")
            assert await api.answers()
        api.stop()
