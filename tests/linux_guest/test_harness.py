"""The parts of the Linux guest's surroundings, each by itself."""

from __future__ import annotations

import hashlib
import lzma
import os
import socket
import stat
import zlib
from pathlib import Path

import pytest

from tests.linux_guest import debian
from tests.linux_guest.disk import make_disk, missing_tools, read_file
from tests.linux_guest.initrd import INIT, Member, cpio, initrd, members_of, unpacked, with_dependencies
from tests.linux_guest.pattern import PIECE, pieces
from tests.linux_guest.peer import NO_DIGEST, Peer
from tests.linux_guest.proof import as_toml
from tests.linux_guest.report import Report
from tests.toolchain import skip_under_another, tool

FOLDER = Path(__file__).parent


@pytest.mark.compiler
def test_the_committed_init_is_what_the_sources_give(tmp_path: Path) -> None:
    """Byte for byte, under the compiler that made it; another compiler makes another."""
    skip_under_another(FOLDER / "TOOLCHAIN", made="init was")
    tool("make", "-s", "-C", str(FOLDER), f"OUT={tmp_path}")
    assert (tmp_path / "init").read_bytes() == INIT.read_bytes()


def test_init_names_no_path_of_whoever_built_it() -> None:
    init = INIT.read_bytes()
    assert len(init) < 32 << 10
    assert b"init.c" not in init
    assert str(FOLDER).encode() not in init


# -- initial RAM disk --------------------------------------------------------------------------------------------


def test_an_archive_reads_as_it_was_written() -> None:
    members = [
        Member("a", stat.S_IFDIR | 0o755),
        Member("a/b", stat.S_IFREG | 0o644, b"odd"),
        Member("c", stat.S_IFCHR | 0o600, device=(5, 1)),
        Member("d", stat.S_IFREG | 0o644, bytes(1000)),
    ]
    archive = cpio(members)
    assert list(members_of(archive)) == members
    assert len(archive) % 4 == 0
    assert cpio(members) == archive


def module(folder: Path, name: str, *needs: str) -> Path:
    path = folder / "kernel" / name
    path.parent.mkdir(exist_ok=True)
    data = b"\x7fELF\0license=GPL\0depends=" + ",".join(needs).encode() + b"\0retpoline=Y\0"
    path.write_bytes(lzma.compress(data) if name.endswith(".xz") else data)
    return path


def test_modules_come_after_what_they_need(tmp_path: Path) -> None:
    ring = module(tmp_path, "virtio_ring.ko.xz")
    virtio = module(tmp_path, "virtio.ko", "virtio_ring")
    rng = module(tmp_path, "virtio-rng.ko", "virtio", "virtio_ring")
    module(tmp_path, "other.ko")
    found = with_dependencies(["virtio_rng", "virtio", "built_in"], tmp_path)
    assert found == [ring, virtio, rng]
    members = {member.name: member for member in members_of(initrd(found))}
    assert members["modules"].data == b"/lib/virtio_ring.ko\n/lib/virtio.ko\n/lib/virtio-rng.ko\n"
    assert members["lib/virtio_ring.ko"].data.startswith(b"\x7fELF")
    assert members["init"].data == INIT.read_bytes()


def test_packed_modules_are_unpacked(tmp_path: Path) -> None:
    gzip = zlib.compressobj(wbits=31)
    for suffix, data in ((".ko", b"module"), (".ko.xz", lzma.compress(b"module"))):
        (tmp_path / f"m{suffix}").write_bytes(data)
        assert unpacked(tmp_path / f"m{suffix}") == b"module"
    (tmp_path / "m.ko.gz").write_bytes(gzip.compress(b"module") + gzip.flush())
    assert unpacked(tmp_path / "m.ko.gz") == b"module"


# -- files, by disk and by TCP -----------------------------------------------------------------------------------


def test_files_are_of_their_size_and_their_pieces_differ() -> None:
    for size in (0, 1, PIECE, PIECE + 7, 3 * PIECE):
        assert sum(map(len, pieces(size))) == size
    assert len(set(pieces(5 * PIECE))) == 5


def test_a_disk_holds_what_was_put_there(tmp_path: Path) -> None:
    missing = missing_tools()
    if missing is not None:
        pytest.skip(missing)
    file = b"".join(pieces(100_000))
    make_disk(tmp_path / "disk", 8 << 20, {"from-host": file})
    assert (tmp_path / "disk").stat().st_size == 8 << 20
    assert read_file(tmp_path / "disk", "from-host") == file
    with pytest.raises(AssertionError, match=r"^from-guest is not on the disk$"):
        read_file(tmp_path / "disk", "from-guest")


def connected(peer: Peer) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", peer.port), timeout=10)
    connection.settimeout(10)
    return connection


def read_to_end(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.mark.parametrize("checksums", [True, False])
def test_the_peer_takes_and_sends(checksums: bool) -> None:  # noqa: FBT001 - a table
    file = b"".join(pieces(200_000))
    digest = hashlib.sha256(file).digest() if checksums else NO_DIGEST
    with Peer("127.0.0.1", size=len(file), checksums=checksums) as peer:
        with connected(peer) as connection:
            connection.sendall(b"u" + file)
            connection.shutdown(socket.SHUT_WR)
            assert read_to_end(connection) == digest
        with connected(peer) as connection:
            connection.sendall(b"d")
            taken = read_to_end(connection)
        assert len(taken) == len(file) + 32
        assert taken[-32:] == digest
        assert not checksums or taken[:-32] == file
    assert [(transfer.way, transfer.size, transfer.sha256) for transfer in peer.transfers] == [
        ("sent", len(file), digest.hex()),
        ("taken", len(file), digest.hex()),
    ]
    assert peer.problem is None


def test_a_guest_that_hangs_up_is_not_the_peer_s_end() -> None:
    with Peer("127.0.0.1", size=64 << 20) as peer:
        with connected(peer) as connection:
            connection.sendall(b"d")
            assert connection.recv(1)
        connected(peer).close()
        with connected(peer) as connection:
            connection.sendall(b"u")
            connection.shutdown(socket.SHUT_WR)
            assert read_to_end(connection) == hashlib.sha256().digest()
    assert isinstance(peer.problem, OSError)
    assert [transfer.size for transfer in peer.transfers] == [0]


# -- words ---------------------------------------------------------------------------------------------------------


def test_a_report_is_init_s_lines_and_no_others() -> None:
    console = (
        b"[    0.1] kvmd-test: a kernel's\r\nkvmd-test: init ns 12\r\nkvmd-test: read bytes 4096 ns 99\r\n"
        b"kvmd-test: failed eth0: errno 19\r\nkvmd-test: done 1 failures\nkvmd-test: half"
    )
    report = Report(console)
    assert report.number("init", "ns") == 12
    assert report.number("read", "ns") == 99
    assert report.failures == ["eth0: errno 19"]
    assert report["done"] == "1 failures"
    assert "half" not in report


def test_a_machine_as_toml() -> None:
    assert as_toml({"kernel": "/k", "vcpus": 2, "disks": [{"path": "/d", "readonly": True}]}) == (
        'kernel = "/k"\nvcpus = 2\n[[disks]]\npath = "/d"\nreadonly = true\n'
    )


def test_the_newest_kernel_of_the_cache_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian, "CACHE", tmp_path)
    assert debian.find() is None
    for age, version in ((2, "6.1.0-9"), (1, "6.1.0-10")):
        image = tmp_path / version / "boot" / f"vmlinuz-{version}-cloud-amd64"
        image.parent.mkdir(parents=True)
        image.write_bytes(b"kernel")
        (tmp_path / version / "lib" / "modules" / f"{version}-cloud-amd64").mkdir(parents=True)
        os.utime(image, (1_000_000_000 - age, 1_000_000_000 - age))
    found = debian.find()
    assert found is not None
    assert found.image == image
    assert found.modules == tmp_path / "6.1.0-10" / "lib" / "modules" / "6.1.0-10-cloud-amd64"


APT = """#!/bin/sh
echo "$0 $*" >>"{folder}/calls"
case "${{0##*/}} $1" in
"apt-get update") touch "{folder}/updated" ;;
"apt-cache depends") test -e "{folder}/updated" && echo "  Depends: linux-image-6.1.0-9-cloud-amd64" ;;
"apt-get download") touch linux-image_9.deb ;;
"dpkg-deb --extract") mkdir -p "$3/boot" "$3/lib/modules/9" && touch "$3/boot/vmlinuz-9" ;;
esac
exit 0
"""


def test_a_kernel_is_fetched_once_and_apt_s_lists_are_updated_where_they_know_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("apt-get", "apt-cache", "dpkg-deb"):
        (programs / name).write_text(APT.format(folder=tmp_path))
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setattr(debian, "CACHE", tmp_path / "cache")
    image = tmp_path / "cache" / "linux-image_9" / "boot" / "vmlinuz-9"
    assert debian.fetch().image == image
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call.split()[1] for call in calls] == ["depends", "update", "depends", "download", "--extract"]
    assert debian.fetch().image == image
    assert len((tmp_path / "calls").read_text().splitlines()) == len(calls)


def test_where_apt_knows_no_kernel_even_then_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("apt-get", "apt-cache"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(debian, "CACHE", tmp_path / "cache")
    with pytest.raises(LookupError, match=r"^apt knows no package linux-image-cloud-amd64: is this Debian\?$"):
        debian.fetch()
