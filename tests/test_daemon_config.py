from __future__ import annotations

import grp
from pathlib import Path

import pytest

from kvmd.daemon_config import DaemonConfig, daemon_config_of, group_id, load_daemon_config, need_restart
from kvmd.errors import ConfigError

EXAMPLE = Path(__file__).parent.parent / "config" / "kvmd.toml"


def test_the_example_is_valid_and_shows_every_key() -> None:
    config = load_daemon_config(EXAMPLE)
    assert config.api.operators == "kvmd"
    assert config.images.folders == ("/var/lib/kvmd/images",)
    text = EXAMPLE.read_text(encoding="utf-8")
    for table in (config.api, config.images, config.machines, config.log):
        for key in table.__struct_fields__:
            assert f"\n{key} = " in text


def test_the_example_s_other_values_are_the_defaults() -> None:
    example, default = load_daemon_config(EXAMPLE), DaemonConfig()
    different = {key for key in default.api.__struct_fields__ if getattr(default.api, key) != getattr(example.api, key)}
    assert different == {"operators"}
    assert (example.machines, example.log) == (default.machines, default.log)


def test_an_empty_file_is_the_default(tmp_path: Path) -> None:
    path = tmp_path / "kvmd.toml"
    path.touch()
    assert load_daemon_config(path) == DaemonConfig()


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"apy": {}}, "unknown key apy (did you mean api?): the keys here are api, images, disks, networks"),
        ({"api": {"sokket": "/s"}}, "unknown key api.sokket (did you mean socket?): "),
        ({"api": 1}, "api: 1 is not possible: expected a table: [api]"),
        ({"api": {"socket": "kvmd.sock"}}, "api.socket: 'kvmd.sock' is not possible: expected an absolute path"),
        ({"api": {"socket": "/" + "s" * 107}}, "api.socket: "),
        ({"api": {"viewers_socket": "/run/kvmd/kvmd.sock"}}, "api.viewers_socket: "),
        ({"api": {"drain_seconds": -1}}, "api.drain_seconds: -1"),
        ({"api": {"drain_seconds": float("nan")}}, "api.drain_seconds: nan"),
        ({"api": {"connections": 0}}, "api.connections: 0 is not possible"),
        ({"api": {"connections": 8}}, "api.connections_per_user: 256 is not possible"),
        ({"api": {"connections": True}}, "api.connections: True is not possible"),
        ({"api": {"connections": 10**5000}}, "api.connections: a number of thousands of digits"),
        ({"machines": {"units": "yes"}}, "machines.units: 'yes' is not possible: expected"),
        ({"machines": {"waiting": -1}}, "machines.waiting: -1 is not possible"),
        ({"machines": {"waiting": 1001}}, "machines.waiting: 1001 is not possible"),
        ({"machines": {"socket": "s"}}, "machines.socket: 's' is not possible"),
        ({"machines": {"socket": "/run/kvmd/kvmd.sock"}}, "machines.socket: '/run/kvmd/kvmd.sock' is not possible"),
        ({"log": {"level": "loud"}}, "log.level: 'loud' is not possible"),
        ({"images": {"folders": "here"}}, "images.folders: 'here' is not possible: expected a list"),
        ({"images": {"folders": ["here"]}}, "images.folders: 'here' is not possible"),
        ({"images": {"folders": [1]}}, "images.folders: [1] is not possible"),
    ],
)
def test_what_cannot_be_meant_is_told_with_its_key(document: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        daemon_config_of(document)
    assert str(caught.value).startswith(message)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[api", "not TOML: "),
        (b"\xff", "not TOML: line 1 is not UTF-8 text"),
        (b"a = " + b"[" * 100_000, "not TOML: nested too deeply"),
        (b"#" * (2 << 20), "more than 1 MiB is no daemon's configuration"),
    ],
)
def test_a_file_that_is_no_configuration_is_told_with_its_name(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "kvmd.toml"
    path.write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        load_daemon_config(path)
    assert str(caught.value).startswith(f"{path}: {message}")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*: No such file or directory"):
        load_daemon_config(tmp_path / "kvmd.toml")


def test_groups_are_looked_up() -> None:
    group = grp.getgrall()[0]
    assert group_id("api.operators", group.gr_name) == group.gr_gid
    assert group_id("api.operators", "") is None
    for name in ("no-such-group-at-all", "a\0b"):
        with pytest.raises(ConfigError, match=r"api\.operators: there is no group"):
            group_id("api.operators", name)


def test_what_a_running_daemon_does_not_take_over_is_named() -> None:
    old = DaemonConfig()
    new = daemon_config_of(
        {
            "api": {
                "socket": "/s",
                "operators": "root",
                "connections": 300,
                "drain_seconds": 1,
                "viewers_socket": "/v",
            },
            "machines": {"units": "never", "waiting": 7},
            "log": {"level": "debug"},
            "images": {"folders": ["/images"]},
            "disks": {"folders": ["/disks"]},
            "networks": {"bridges": ["br0"], "namespaces": True},
        }
    )
    assert need_restart(old, new) == ["api.socket", "api.viewers_socket", "machines.units"]
    assert need_restart(new, new) == []
