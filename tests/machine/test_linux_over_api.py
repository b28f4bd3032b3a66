"""Linux machines made over the API: which files and bridges it lets them have, and that they get just those."""

from __future__ import annotations

import os
import select
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from kvmd.network.tap import Tap
from tests.fleet.conftest import MARK, open_files_of, processes_of
from tests.linux.kernels import bzimage, running, vmlinux
from tests.linux_guest.daemon import Daemon
from tests.own_network import own_network

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


DISK = {"path": "disk.raw"}
MADE = {"kind": "made-bridge", "bridge": "made"}
GONE_SECONDS = 20.0

REFUSALS: list[tuple[dict[str, object], str, str]] = [
    ({"kernel": "early"}, "invalid-image", "not a Linux kernel: 500 bytes are too short for one"),
    ({"kernel": "header"}, "invalid-image", "truncated: it says that it has 4096 bytes, the file has 1024"),
    ({"kernel": "payload"}, "invalid-image", "truncated: it says that it has 4096 bytes, the file has 4000"),
    ({"kernel": "elf"}, "invalid-image", "no PVH entry point"),
    ({"initrd": "large"}, "invalid-image", "the initrd of 80 MiB does not fit beside the kernel: give at least"),
    ({"initrd": "empty"}, "invalid-image", "the initrd empty is empty"),
    ({"disks": [DISK, {"path": "missing"}]}, "invalid-image", "cannot open the disk missing in an allowed folder"),
    ({"disks": [DISK, {"path": "fifo"}]}, "invalid-image", "is not an ordinary file"),
    ({"disks": [DISK, {"path": "odd"}]}, "invalid-spec", "disk odd: 700 bytes are not a multiple of 512"),
    ({"disks": [DISK, {"path": "empty"}]}, "invalid-spec", "disk empty: 0 bytes are too short"),
    ({"disks": [DISK, DISK]}, "invalid-spec", "disk disk.raw: it is locked: another machine or program uses it"),
    ({"disks": [DISK], "networks": [MADE, {"bridge": "missing"}]}, "host-lacks", "there is no bridge missing"),
    ({"disks": [DISK], "networks": [{**MADE, "tap": "taken"}]}, "host-lacks", "there is an interface taken already"),
]


def make_bad_files(folder: Path) -> None:
    (folder / "early").write_bytes(bzimage()[:500])
    (folder / "header").write_bytes(bzimage()[:1024])
    (folder / "payload").write_bytes(bzimage()[:4000])
    (folder / "elf").write_bytes(vmlinux(entry=None))
    with (folder / "large").open("wb") as large:
        large.truncate(80 << 20)
    (folder / "empty").touch()
    (folder / "odd").write_bytes(bytes(700))
    os.mkfifo(folder / "fifo")


def files_of(pid: int) -> int:
    """Return how many files a process has open."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def until(holds: Callable[[], bool]) -> bool:
    """Wait until it holds, for a while: nothing tells that a process has gone but looking again."""
    deadline = time.monotonic() + GONE_SECONDS
    while not (held := holds()) and time.monotonic() < deadline:
        select.select([], [], [], 0.02)
    return held


def are_at_rest(mark: str) -> bool:
    """Tell whether there are the daemon, the parent of machines, and a process that waits, with nothing of a machine's.

    One that was a machine, or failed to become one, has its folder open for as long as it is there: where that was, or
    where it was moved to be removed.
    """
    processes = processes_of(mark)
    with suppress(OSError):  # one has ended meanwhile
        files = [file for process in processes for file in open_files_of(process)]
        return len(processes) == 3 and not any("/state/machines/" in file or "/.removed-" in file for file in files)
    return False


@own_network
@pytest.mark.network
def test_what_cannot_be_is_refused_and_leaves_nothing(
    tmp_path: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MARK, mark := uuid.uuid4().hex)
    make_bad_files(files)
    good = {"name": "l", "kernel": "kernel", "memory": "64M", "accelerator": "kvm"}
    with Tap.make("taken"), Daemon(tmp_path, images=[files], bridges=["made", "missing"]) as daemon:
        links = socket.if_nameindex()
        daemon.ask("POST", "/v1/machines", {**good, "disks": [DISK]})
        daemon.ask("DELETE", "/v1/machines/l")
        assert until(lambda: are_at_rest(mark))
        open_files = files_of(daemon.pid)
        for keys, problem, part in REFUSALS:
            with pytest.raises(AssertionError) as caught:
                daemon.ask("POST", "/v1/machines", {**good, **keys})
            assert f"urn:kvmd:problem:{problem}" in str(caught.value), keys
            assert part in str(caught.value), keys
            assert daemon.ask("GET", "/v1/machines")["machines"] == []
            assert list((tmp_path / "state" / "machines").iterdir()) == []
            assert socket.if_nameindex() == links
        assert until(lambda: are_at_rest(mark))
        assert until(lambda: files_of(daemon.pid) <= open_files)
        # The same disk, in a machine that is possible: nobody has it locked. Then it is that machine's.
        daemon.ask("POST", "/v1/machines", {**good, "disks": [DISK]})
        with pytest.raises(AssertionError, match=r"disk disk\.raw: it is locked"):
            daemon.ask("POST", "/v1/machines", {**good, "name": "other", "disks": [DISK]})
        daemon.ask("DELETE", "/v1/machines/l")
        daemon.ask("POST", "/v1/machines", {**good, "name": "other", "disks": [DISK]})
