"""Linux machines made over the API: which files and bridges it lets them have, and that they get just those."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.linux.kernels import running
from tests.linux_guest.daemon import Daemon

pytestmark = pytest.mark.kvm

# mov ebx, 0xd0000000; mov eax, [rbx + 0x100]; (out 0x3f8; shr 8) four times: sectors of the first disk.
CAPACITY = b"\xbb\x00\x00\x00\xd0\x8b\x83\x00\x01\x00\x00" + b"\x66\xba\xf8\x03" + b"\xee\xc1\xe8\x08" * 4
POWER_OFF = b"\x66\xba\x00\x06\xb0\x34\xee\xeb\xfe"
SECTORS = 0x44332211 & 0xFFFF


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "kernel").write_bytes(running(CAPACITY + POWER_OFF))
    (folder / "initrd").write_bytes(b"070701")
    with (folder / "disk.raw").open("wb") as disk:
        disk.truncate(SECTORS * 512)
    return folder


@pytest.fixture
def daemon(tmp_path: Path, files: Path) -> Iterator[Daemon]:
    with Daemon(tmp_path, images=[files], bridges=["br0"]) as daemon:
        yield daemon


def test_a_machine_has_the_files_that_the_daemon_opened(daemon: Daemon) -> None:
    wanted = {"name": "l", "kernel": "kernel", "initrd": "initrd", "cmdline": "quiet", "disks": [{"path": "disk.raw"}]}
    made = daemon.ask("POST", "/v1/machines", {**wanted, "memory": "64M", "accelerator": "kvm"})
    spec = made["spec"]
    assert (spec["image"], spec["initrd"], spec["disks"]) == ("kernel", "initrd", ["disk.raw"])
    assert (spec["protection"], spec["cmdline"]) == ("none", "quiet")
    with daemon.console("l") as console:
        daemon.ask("POST", "/v1/machines/l/start")
        assert console.read_to_end(seconds=60) == SECTORS.to_bytes(4, "little")
    ended = daemon.ask("GET", "/v1/machines/l/wait?state=stopped&timeout=60")["machine"]["end"]
    assert (ended["reason"], ended["status"]) == ("guest-power-off", 0)


@pytest.mark.parametrize(
    ("keys", "part"),
    [
        ({"kernel": "/etc/passwd"}, "cannot open the kernel /etc/passwd in an allowed folder"),
        ({"initrd": "../kvmd.toml"}, "cannot open the initrd ../kvmd.toml in an allowed folder"),
        ({"disks": [{"path": "/dev/null"}]}, "cannot open the disk /dev/null in an allowed folder"),
        ({"networks": [{"bridge": "br1"}]}, "networks[0].bridge: br1 is not one of the allowed bridges (br0)"),
        ({"networks": [{"kind": "namespace"}]}, "no network namespaces are allowed"),
        ({"image": "builtin:hello"}, "not both"),
        ({"kernel": "disk.raw"}, "not a Linux kernel"),
    ],
)
def test_what_the_administrator_does_not_allow_is_refused(daemon: Daemon, keys: dict[str, object], part: str) -> None:
    with pytest.raises(AssertionError) as caught:
        daemon.ask("POST", "/v1/machines", {"kernel": "kernel", "memory": "64M", **keys})
    assert part in str(caught.value)
    assert daemon.ask("GET", "/v1/machines")["machines"] == []
