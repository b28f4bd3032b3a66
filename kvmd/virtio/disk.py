"""A raw disk image, or a block device, as a guest's disk: opened, locked, checked; read and written."""

from __future__ import annotations

import errno
import mmap
import os
import stat
import struct
from collections.abc import Sequence
from contextlib import ExitStack
from fcntl import F_OFD_GETLK, F_OFD_SETLK, F_RDLCK, F_UNLCK, F_WRLCK, LOCK_EX, LOCK_NB, LOCK_SH, fcntl, flock

from kvmd.closing import Closing
from kvmd.errors import ConfigError
from kvmd.memory import libc
from kvmd.virtio.abi import SECTOR_BYTES

_FLOCK = struct.Struct("@hhqqi0q")
"""struct flock of fcntl(2)."""

_QEMU_READS, _QEMU_WRITES = 100, 101
"""Bytes that QEMU locks, for reading, while it may do that to an image (block/file-posix.c, RAW_LOCK_PERM_BASE)."""

_DIRECT_BLOCKS = (512, 4096)
"""What O_DIRECT may want addresses, offsets and sizes to be multiples of."""

_CANNOT = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV}
"""What fallocate and RWF_NOWAIT say where the file system has no such thing."""

_ZEROS = bytes(1 << 16)


class RawDisk(Closing):
    """An open and locked disk. All I/O blocks, but for ``read_now``; any thread may do it.

    The lock is one of the open file description on the whole file (F_OFD_SETLK): one writer, or any number of readers,
    in whatever process; QEMU's own image locks are seen, and QEMU sees this one. A file is locked by flock(2) as well,
    which does not know of the other kind; a block device is not, since udev does that for a moment after each writer.
    Both locks end with the process.

    Args:
        path: a file whose size is a multiple of 512 bytes, or a block device.
        read_only: never write.
        direct: go past the host's page cache (O_DIRECT) where a request is aligned for it: for data that the guest
            caches itself, so that it is not held twice.

        opened: the disk, open already, whatever ``path`` leads to by now; it is opened anew, and not closed.

    Attributes:
        size_bytes: a multiple of 512.
        read_only: as given.
        block_bytes: what requests should be multiples of: 512, or what O_DIRECT asks for.
        direct: as given.
        errors: requests that failed so far, counted by whoever makes them.

    Raises:
        ConfigError: it is missing, of another kind, locked, read-only, empty, or not a multiple of 512 bytes; or
            cannot be opened with O_DIRECT.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, read_only: bool = False, direct: bool = False, opened: int | None = None
    ) -> None:
        self.path = os.fspath(path)
        self._opened = opened
        self.read_only = read_only
        self.direct = direct
        self.block_bytes = SECTOR_BYTES
        self.errors = 0
        self._nowait = not direct
        with ExitStack() as stack:
            self._fd = self._open(0)
            stack.callback(self.close)
            self._direct_fd = -1
            self.size_bytes = self._checked_size()
            self._lock()
            if direct:
                self._direct_fd = self._open(os.O_DIRECT)
                self.block_bytes = self._probe_direct()
            stack.pop_all()

    # -- opening -------------------------------------------------------------------------------------------------------

    def _open(self, flags: int) -> int:
        way = os.O_RDONLY if self.read_only else os.O_RDWR
        try:
            # O_NONBLOCK: opening a FIFO must not wait for its other end. It means nothing to files and block devices.
            path = self.path if self._opened is None else f"/proc/self/fd/{self._opened}"
            return os.open(path, way | flags | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError as error:
            match error.errno:
                case errno.ENOENT | errno.ENOTDIR:
                    why = "there is no such file: create it, for instance with `truncate -s 1G`"
                case errno.EISDIR:
                    why = "this is a directory: name a raw disk image or a block device"
                case errno.EACCES | errno.EPERM if not self.read_only:
                    why = "it may not be written: change its permissions, or make the disk read-only"
                case errno.ENXIO:
                    why = "there is no device behind it: name a raw disk image or a block device"
                case errno.EROFS:
                    why = "its file system is read-only: make the disk read-only too"
                case errno.EINVAL if flags & os.O_DIRECT:
                    why = "its file system has no O_DIRECT: leave `direct` out"
                case _:
                    why = f"it cannot be opened: {error.strerror}"
            raise ConfigError(f"disk {self.path}: {why}") from error
        except ValueError as error:
            raise ConfigError(f"disk {self.path!r}: {error}: name a file") from error

    def _checked_size(self) -> int:
        mode = os.fstat(self._fd).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise ConfigError(f"disk {self.path}: it is neither a file nor a block device")
        try:
            size_bytes = os.lseek(self._fd, 0, os.SEEK_END)
        except OSError as error:  # some files of /proc and /sys
            raise ConfigError(f"disk {self.path}: it has no size: name a raw disk image or a block device") from error
        if size_bytes < SECTOR_BYTES:
            raise ConfigError(
                f"disk {self.path}: {size_bytes} bytes are too short for a disk, which has at least one sector of "
                f"{SECTOR_BYTES}"
            )
        if size_bytes % SECTOR_BYTES:
            raise ConfigError(
                f"disk {self.path}: {size_bytes} bytes are not a multiple of {SECTOR_BYTES}: is it a raw image, and "
                f"whole? `truncate -s %{SECTOR_BYTES}` would round it up"
            )
        return size_bytes

    def _lock(self) -> None:
        kind = F_RDLCK if self.read_only else F_WRLCK
        try:
            fcntl(self._fd, F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0))
            if stat.S_ISREG(os.fstat(self._fd).st_mode):
                self._flock()
            if self.read_only:
                self._look_for_qemu()
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                who = "writes it" if self.read_only else "uses it: stop that one, or make the disk read-only in both"
                raise ConfigError(f"disk {self.path}: it is locked: another machine or program {who}") from error
            raise ConfigError(f"disk {self.path}: it cannot be locked: {error.strerror}") from error

    def _flock(self) -> None:
        try:
            flock(self._fd, LOCK_NB | (LOCK_SH if self.read_only else LOCK_EX))
        except OSError as error:
            # Where the file system has none nobody else has one, either.
            if error.errno == errno.EWOULDBLOCK:
                raise

    def _look_for_qemu(self) -> None:
        """Raise BlockingIOError where QEMU writes the image: all its locks are for reading, and a reader's bears them.

        The first lock that is found tells: a reader's of the whole image would have kept such a QEMU out.
        """
        found = fcntl(self._fd, F_OFD_GETLK, _FLOCK.pack(F_WRLCK, os.SEEK_SET, _QEMU_WRITES, 1, 0))
        kind, _, start, *_ = _FLOCK.unpack(found)
        if kind != F_UNLCK and start in (_QEMU_READS, _QEMU_WRITES):
            raise BlockingIOError(errno.EAGAIN, "QEMU writes it")

    def _probe_direct(self) -> int:
        for block_bytes in _DIRECT_BLOCKS:
            with mmap.mmap(-1, block_bytes) as buffer:
                try:
                    os.preadv(self._direct_fd, [buffer], 0)
                except OSError:
                    continue
                return block_bytes
        raise ConfigError(f"disk {self.path}: reads with O_DIRECT fail on it: leave `direct` out")

    def close(self) -> None:
        """Unlock and close it; harmless the second time."""
        for name in ("_fd", "_direct_fd"):
            fd = getattr(self, name, -1)
            setattr(self, name, -1)
            if fd >= 0:
                os.close(fd)

    # -- I/O: raises OSError -------------------------------------------------------------------------------------------

    def read_now(self, views: Sequence[memoryview], offset: int, size_bytes: int) -> bool:
        """Read if the host has it all in memory, and tell whether; does not wait for a disk (RWF_NOWAIT)."""
        if not self._nowait:
            return False
        try:
            return os.preadv(self._fd, views, offset, os.RWF_NOWAIT) == size_bytes
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno in _CANNOT:
                self._nowait = False
            return False

    def read(self, views: Sequence[memoryview], offset: int, *, aligned: bool = False) -> None:
        """Fill the views from ``offset`` on.

        Args:
            views: where to.
            offset: in bytes.
            aligned: whether offset, addresses and sizes are multiples of ``block_bytes``.
        """
        fd = self._direct_fd if aligned and self.direct else self._fd
        while views:
            done = os.preadv(fd, views, offset)
            if not done:
                raise OSError(errno.EIO, "the image was cut short while the guest runs")
            offset += done
            views = _rest(views, done)

    def write(self, views: Sequence[memoryview | bytes], offset: int, *, aligned: bool = False, stable: bool) -> None:
        """Write the views from ``offset`` on.

        Args:
            views: where from.
            offset: in bytes.
            aligned: see ``read``.
            stable: come back when it is on the disk (RWF_DSYNC).
        """
        fd = self._direct_fd if aligned and self.direct else self._fd
        flags = os.RWF_DSYNC if stable else 0
        while views:
            done = os.pwritev(fd, views, offset, flags)
            offset += done
            views = _rest(views, done)

    def flush(self) -> None:
        """Come back when everything that was written is on the disk."""
        if not self.read_only:
            os.fdatasync(self._fd)

    def discard(self, offset: int, size_bytes: int) -> None:
        """Give the space back. A hint: where the file system cannot, the data stays."""
        try:
            libc.punch_hole(self._fd, offset, size_bytes)
        except OSError as error:
            if error.errno not in _CANNOT:
                raise

    def zero(self, offset: int, size_bytes: int, *, unmap: bool, stable: bool) -> None:
        """Make it zeros, with the space given back where ``unmap``."""
        try:
            (libc.punch_hole if unmap else libc.zero_range)(self._fd, offset, size_bytes)
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
        else:
            if stable:
                os.fdatasync(self._fd)
            return
        end = offset + size_bytes
        while offset < end:
            piece = _ZEROS[: end - offset]
            self.write([piece], offset, stable=stable)
            offset += len(piece)


def _rest(views: Sequence[memoryview | bytes], done: int) -> list[memoryview]:
    """Return what is left of the views after ``done`` bytes of them."""
    rest: list[memoryview] = []
    for view in views:
        size_bytes = len(view)
        if done < size_bytes:
            rest.append(memoryview(view)[done:])
        done = max(done - size_bytes, 0)
    return rest
