"""The C library calls that guest memory needs, with errno kept and the GIL released while they run.

``mmap.mmap`` has no PROT_NONE mapping that ctypes may address, and its ``madvise`` holds the GIL while a large
hole is punched; so the calls are made directly.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os

_libc = ctypes.CDLL(None, use_errno=True)

_mmap = _libc.mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
)
_munmap = _libc.munmap
_munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_madvise = _libc.madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_fallocate = _libc.fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)

_mincore = _libc.mincore
_mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)

_IS_RESIDENT = bytes(byte & 1 for byte in range(256))
_RESIDENT_PAGES = 1 << 18
"""Pages that are looked at in one call."""

_MAP_FAILED = ctypes.c_void_p(-1).value
_MAP_NORESERVE = 0x4000
_FALLOC_FL_KEEP_SIZE = 0x1
_FALLOC_FL_PUNCH_HOLE = 0x2
_FALLOC_FL_ZERO_RANGE = 0x10
_PUNCH = _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE


def _error(operation: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{operation}: {os.strerror(number)}")


def map_shared(fd: int, size_bytes: int) -> int:
    """Map all of the file for reading and writing and return the address; no memory is reserved.

    Raises:
        OSError: ENOMEM where the address space does not suffice.
    """
    address = _mmap(None, size_bytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_NORESERVE, fd, 0)
    if address == _MAP_FAILED:
        raise _error(f"mmap of {size_bytes} bytes")
    return int(address)


def map_anonymous(size_bytes: int, *, alignment: int) -> int:
    """Map zeros for reading and writing and return the address; no memory is reserved.

    Args:
        size_bytes: a multiple of the page.
        alignment: of the address, a power of two and a multiple of the page.

    Raises:
        OSError: ENOMEM where the address space does not suffice, EINVAL for no bytes at all.
    """
    if not 0 < size_bytes < 1 << 63:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    # As much more as the kernel's choice may be out of alignment; both ends of it are given back.
    whole = size_bytes + alignment
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    found = _mmap(None, whole, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    if found == _MAP_FAILED:
        raise _error(f"mmap of {size_bytes} bytes")
    address = -(-found // alignment) * alignment
    if address > found:
        unmap(found, address - found)
    if address + size_bytes < found + whole:
        unmap(address + size_bytes, found + whole - address - size_bytes)
    return int(address)


def advise(address: int, size_bytes: int, advice: int, *, ignore_unsupported: bool = False) -> None:
    """Tell the kernel how memory will be used (madvise(2)).

    Args:
        address: a multiple of the page.
        size_bytes: likewise.
        advice: MADV_*.
        ignore_unsupported: EINVAL is no error: this kernel does not know the advice.

    Raises:
        OSError: as the kernel refuses.
    """
    if _madvise(address, size_bytes, advice) != 0:
        error = _error(f"madvise {advice} of {size_bytes} bytes")
        if not (ignore_unsupported and error.errno == errno.EINVAL):
            raise error


def map_inaccessible(size_bytes: int) -> int:
    """Reserve addresses that nothing can access (PROT_NONE) and return the first one.

    Raises:
        OSError: ENOMEM where the address space does not suffice.
    """
    address = _mmap(None, size_bytes, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1, 0)
    if address == _MAP_FAILED:
        raise _error(f"mmap of {size_bytes} inaccessible bytes")
    return int(address)


def resident_bytes(address: int, size_bytes: int) -> int:
    """Return how much of a mapping the host holds in memory, in bytes (mincore(2)).

    Raises:
        OSError: ENOMEM where part of it is not mapped.
    """
    pages = -(-size_bytes // mmap.PAGESIZE)
    vector = ctypes.create_string_buffer(min(pages, _RESIDENT_PAGES))
    held = 0
    for first in range(0, pages, _RESIDENT_PAGES):
        count = min(_RESIDENT_PAGES, pages - first)
        if _mincore(address + first * mmap.PAGESIZE, count * mmap.PAGESIZE, vector) != 0:
            raise _error("mincore")
        held += vector.raw[:count].translate(_IS_RESIDENT).count(1)
    return held * mmap.PAGESIZE


def unmap(address: int, size_bytes: int) -> None:
    """Undo a mapping.

    Raises:
        OSError: the address is not one that was mapped.
    """
    if _munmap(address, size_bytes) != 0:
        raise _error("munmap")


def punch_hole(fd: int, offset: int, size_bytes: int) -> None:
    """Give the file's pages back to the host; they read as zeros from now on (fallocate(2)).

    Raises:
        OSError: as the file system refuses.
    """
    # Once for each conversion: without another frame, where nothing is wrong.
    if _fallocate(fd, _PUNCH, offset, size_bytes):
        _allocate(fd, _FALLOC_FL_PUNCH_HOLE, offset, size_bytes, "punching a hole")


def zero_range(fd: int, offset: int, size_bytes: int) -> None:
    """Make the file's bytes zeros, with their space still allocated (fallocate(2)).

    Raises:
        OSError: as the file system refuses; EOPNOTSUPP where it cannot.
    """
    _allocate(fd, _FALLOC_FL_ZERO_RANGE, offset, size_bytes, "zeroing")


def _allocate(fd: int, mode: int, offset: int, size_bytes: int, what: str) -> None:
    while _fallocate(fd, mode | _FALLOC_FL_KEEP_SIZE, offset, size_bytes) != 0:
        error = _error(f"{what} of {size_bytes} bytes at {offset:#x}")
        if not isinstance(error, InterruptedError):
            raise error
