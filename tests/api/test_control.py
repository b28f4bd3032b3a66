from __future__ import annotations

import grp
import os
import socket
import stat
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio
from msgspec.structs import replace

from kvmd.api.access import Role
from kvmd.api.control import ControlApi
from kvmd.api.server.peer import Peer
from kvmd.daemon_config import ApiConfig, DaemonConfig
from kvmd.errors import ConfigError, HostError
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


def other_group() -> grp.struct_group:
    """A group that this process may give files to: as root, any."""
    return next(group for group in grp.getgrall() if group.gr_gid not in {os.getegid(), *os.getgroups()})


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give sockets to any group")
async def test_a_reload_changes_who_may_do_what(tmp_path: Path) -> None:
    other = other_group()
    config = config_in(tmp_path, viewers="")
    api = ControlApi(config, FakeFleet(), HOST)
    peer = Peer(pid=1, uid=54321, groups=frozenset({other.gr_gid}))
    assert api.role_of(peer) is None
    async with trio.open_nursery() as nursery:
        await nursery.start(api.serve)
        changed = replace(config, api=replace(config.api, operators=other.gr_name))
        assert api.reconfigure(changed) == []
        assert api.role_of(peer) is Role.OPERATE
        assert (tmp_path / "s").stat().st_gid == other.gr_gid
        changed = replace(config, api=replace(config.api, viewers=other.gr_name))
        # There is no socket yet that they could come through.
        assert api.reconfigure(changed) == ["api.viewers"]
        assert api.role_of(peer) is Role.VIEW
        assert (tmp_path / "s").stat().st_gid == os.getegid()
        with pytest.raises(ConfigError, match=r"api\.operators: there is no group 'kvmd-nobody'"):
            api.reconfigure(replace(config, api=replace(config.api, operators="kvmd-nobody")))
        assert api.role_of(peer) is Role.VIEW
        api.stop()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give sockets to any group")
async def test_a_reload_gives_the_viewers_socket_to_other_viewers(tmp_path: Path) -> None:
    other = other_group()
    config = config_in(tmp_path)
    api = ControlApi(config, FakeFleet(), HOST)
    async with trio.open_nursery() as nursery:
        await nursery.start(api.serve)
        assert api.reconfigure(replace(config, api=replace(config.api, viewers=other.gr_name))) == []
        assert (tmp_path / "v").stat().st_gid == other.gr_gid
        assert api.reconfigure(replace(config, api=replace(config.api, viewers=""))) == []
        assert (tmp_path / "v").stat().st_gid == os.getegid()
        (tmp_path / "s").unlink()
        with pytest.raises(HostError, match="cannot give the socket"):
            api.reconfigure(config)
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
