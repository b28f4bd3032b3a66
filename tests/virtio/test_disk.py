from __future__ import annotations

import errno
import fcntl
import mmap
import os
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest

from kvmd.errors import ConfigError
from kvmd.memory import libc
from kvmd.network.own_thread import in_own_thread
from kvmd.units import MIB
from kvmd.virtio import disk as module
from kvmd.virtio.disk import RawDisk
from tests.own_network import leave_network


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(os.urandom(MIB))
    return path


def refusal(path: object, **options: bool) -> str:
    with pytest.raises(ConfigError) as caught:
        RawDisk(str(path), **options)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_missing(tmp_path: Path) -> None:
    assert "there is no such file: create it" in refusal(tmp_path / "nothing")
    assert "there is no such file" in refusal(tmp_path / "nothing", read_only=True)


def test_no_disk_at_all(tmp_path: Path) -> None:
    assert "this is a directory" in refusal(tmp_path)
    assert "neither a file nor a block device" in refusal(tmp_path, read_only=True)
    assert "neither a file nor a block device" in refusal("/dev/null")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        assert "no device behind it" in refusal(tmp_path / "socket")
    os.mkfifo(tmp_path / "fifo")
    assert "neither a file nor a block device" in refusal(tmp_path / "fifo")
    assert "neither a file nor a block device" in refusal(tmp_path / "fifo", read_only=True)
    assert "it has no size: name a raw disk image" in refusal("/proc/version", read_only=True)


def test_a_name_that_no_file_can_have() -> None:
    with pytest.raises(ConfigError, match="null byte: name a file"):
        RawDisk("with\0zero")


@pytest.mark.parametrize(
    ("size", "reason"),
    [(0, "0 bytes are too short"), (511, "511 bytes are too short"), (513, "513 bytes are not a multiple of 512")],
)
def test_sizes_that_no_disk_has(tmp_path: Path, size: int, reason: str) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(size))
    assert reason in refusal(path)


def test_read_only_files_are_for_read_only_disks(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image.chmod(stat.S_IRUSR)
    real = os.open

    def as_anybody(path: str, flags: int) -> int:
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise PermissionError(13, "Permission denied")  # root, which runs tests too, would be let through
        return real(path, flags)

    monkeypatch.setattr(os, "open", as_anybody)
    assert "may not be written: change its permissions, or make the disk read-only" in refusal(image)
    with RawDisk(image, read_only=True) as disk:
        assert disk.size_bytes == MIB


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a file system")
def test_a_disk_on_a_read_only_file_system() -> None:
    def refused() -> None:
        leave_network()  # and into a mount namespace of its own, with an empty /run
        Path("/run/disk").write_bytes(bytes(512))
        subprocess.run(["mount", "-o", "remount,ro", "/run"], check=True)  # noqa: S607 - wherever it is
        assert "its file system is read-only: make the disk read-only too" in refusal("/run/disk")

    in_own_thread(refused)


def test_one_writer_or_many_readers(image: Path) -> None:
    with RawDisk(image):
        assert "it is locked: another machine or program uses it" in refusal(image)
        assert "it is locked: another machine or program writes it" in refusal(image, read_only=True)
    with RawDisk(image, read_only=True), RawDisk(image, read_only=True):
        assert "it is locked" in refusal(image)
    with RawDisk(image):
        pass


@pytest.mark.parametrize(("other", "refused"), [(fcntl.LOCK_EX, True), (fcntl.LOCK_SH, False)])
def test_who_locks_it_by_flock_is_heeded(image: Path, other: int, refused: bool) -> None:  # noqa: FBT001 - a table
    with image.open("rb") as held:
        fcntl.flock(held, other)
        assert "it is locked: another machine or program uses it" in refusal(image)
        if refused:
            assert "it is locked: another machine or program writes it" in refusal(image, read_only=True)
        else:
            RawDisk(image, read_only=True).close()
    with RawDisk(image), image.open("rb") as late, pytest.raises(BlockingIOError):
        fcntl.flock(late, fcntl.LOCK_SH | fcntl.LOCK_NB)


def ofd_lock(file: IO[bytes], kind: int, start: int, size_bytes: int) -> None:
    fcntl.fcntl(file, fcntl.F_OFD_SETLK, struct.pack("@hhqqi0q", kind, os.SEEK_SET, start, size_bytes, 0))


@pytest.mark.parametrize("first", [100, 101])
def test_who_writes_it_in_qemu_is_heeded_by_readers_too(image: Path, first: int) -> None:
    # As seen of QEMU 10 with if=virtio: a byte for each permission that it has, and for each that others may not have.
    with image.open("rb") as held:
        ofd_lock(held, fcntl.F_RDLCK, first, 102 - first)
        ofd_lock(held, fcntl.F_RDLCK, 201, 1)
        assert "it is locked: another machine or program uses it" in refusal(image)
        assert "it is locked: another machine or program writes it" in refusal(image, read_only=True)


def test_who_reads_it_in_qemu_or_locks_all_of_it_for_reading_may_go_on(image: Path) -> None:
    with image.open("rb") as held, image.open("rb") as other:
        ofd_lock(held, fcntl.F_RDLCK, 100, 1)
        ofd_lock(held, fcntl.F_RDLCK, 201, 1)
        ofd_lock(other, fcntl.F_RDLCK, 0, MIB)
        with RawDisk(image, read_only=True), RawDisk(image, read_only=True):
            assert "it is locked" in refusal(image)


def test_a_file_system_without_flock_has_no_such_locks(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_here(_fd: int, _how: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(module, "flock", none_here)
    with RawDisk(image):
        assert "it is locked" in refusal(image)


def test_another_process_is_kept_out_and_its_end_unlocks(image: Path) -> None:
    script = (
        "import sys\nfrom kvmd.virtio.disk import RawDisk\ndisk = RawDisk(sys.argv[1])\n"
        "print('locked', flush=True)\nsys.stdin.read()\n"
    )
    with subprocess.Popen(  # noqa: S603  this interpreter, on a line written here
        [sys.executable, "-c", script, str(image)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"locked\n"
        assert "it is locked" in refusal(image)
        other.kill()
        other.wait()
    with RawDisk(image):
        pass


def test_reads_and_writes_in_pieces(image: Path) -> None:
    with RawDisk(image) as disk:
        disk.write([b"abc", memoryview(b"defgh")], 100, stable=False)
        disk.write([b"stable"], 200, stable=True)
        first, second = bytearray(5), bytearray(3)
        disk.read([memoryview(first), memoryview(second)], 100)
        assert bytes(first + second) == b"abcdefgh"
        disk.flush()
    assert image.read_bytes()[200:206] == b"stable"


def test_what_is_to_be_on_the_disk_is_asked_of_the_kernel(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    real_write, real_sync = os.pwritev, os.fdatasync

    def write(fd: int, views: list[bytes], offset: int, flags: int = 0) -> int:
        asked.append("stable write" if flags & os.RWF_DSYNC else "write")
        return real_write(fd, views, offset, flags)

    def sync(fd: int) -> None:
        asked.append("sync")
        real_sync(fd)

    monkeypatch.setattr(os, "pwritev", write)
    monkeypatch.setattr(os, "fdatasync", sync)
    with RawDisk(image) as disk:
        disk.write([b"a"], 0, stable=False)
        disk.write([b"b"], 0, stable=True)
        disk.flush()
    assert asked == ["write", "stable write", "sync"]
    with RawDisk(image, read_only=True) as disk:
        disk.flush()
    assert len(asked) == 3


def test_a_short_transfer_goes_on_where_it_ended(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = image.read_bytes()
    real = os.preadv

    def some(fd: int, views: list[memoryview], offset: int) -> int:
        return real(fd, [views[0][:700]], offset)

    with RawDisk(image) as disk:
        monkeypatch.setattr(os, "preadv", some)
        first, second = bytearray(1000), bytearray(1000)
        disk.read([memoryview(first), memoryview(second)], 512)
    assert bytes(first + second) == content[512:2512]


def test_an_image_that_was_cut_short_is_an_io_error(image: Path) -> None:
    with RawDisk(image) as disk:
        os.truncate(image, 1024)
        with pytest.raises(OSError, match="cut short"):
            disk.read([memoryview(bytearray(1024))], 512)


def test_discarded_space_is_given_back_and_zeros_are_zeros(image: Path) -> None:
    with RawDisk(image) as disk:
        os.fsync(disk._fd)
        before = image.stat().st_blocks
        disk.discard(0, 65536)
        assert image.stat().st_blocks < before
        disk.zero(65536, 65536, unmap=True, stable=True)
        disk.zero(131072, 65536 + 512, unmap=False, stable=False)
    content = image.read_bytes()
    assert content[: 196608 + 512] == bytes(196608 + 512)
    assert content[196608 + 512 :].count(0) < MIB // 64
    assert len(content) == MIB


def test_zeros_are_written_where_the_file_system_can_do_no_better(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(_fd: int, _offset: int, _size: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(libc, "punch_hole", cannot)
    monkeypatch.setattr(libc, "zero_range", cannot)
    content = image.read_bytes()
    with RawDisk(image) as disk:
        disk.discard(0, 4096)
        assert image.read_bytes() == content, "a hint, which cannot be followed here"
        disk.zero(512, 100_000 * 4, unmap=True, stable=False)
    assert image.read_bytes() == content[:512] + bytes(400_000) + content[400_512:]


def test_direct_io_where_the_file_system_has_it(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        disk = RawDisk(image, direct=True)
    except ConfigError as error:
        pytest.skip(str(error))
    with disk:
        assert disk.block_bytes in (512, 4096)
        assert not disk.read_now([memoryview(bytearray(512))], 0, 512), "there is no cache to read from"
        went: list[bool] = []

        def watched(real: Callable[..., int]) -> Callable[..., int]:
            def io(fd: int, *rest: object) -> int:
                went.append(bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT))
                return real(fd, *rest)

            return io

        monkeypatch.setattr(os, "preadv", watched(os.preadv))
        monkeypatch.setattr(os, "pwritev", watched(os.pwritev))
        disk.read([memoryview(bytearray(100))], 7)  # not aligned: past O_DIRECT
        with mmap.mmap(-1, 4096) as page, memoryview(page) as view:
            disk.read([view], 4096, aligned=True)
            assert bytes(view) == image.read_bytes()[4096:8192]
            disk.write([view], 0, aligned=True, stable=False)
        disk.write([b"x"], 9, stable=False)
        assert went == [False, True, True, False]


def test_no_direct_io_is_told_before_the_guest_starts(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def without(path: str, flags: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(path, flags)

    monkeypatch.setattr(os, "open", without)
    assert "its file system has no O_DIRECT: leave `direct` out" in refusal(image, direct=True)
