"""Reading the files that a guest is made of: its image, or its kernel and initial RAM disk."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from kvmd.errors import ImageError
from kvmd.units import GIB, format_size

_LIMIT = GIB
"""The largest file that is read."""

_READ_AT_ONCE = 1 << 20


def read_file(key: str, path: Path, opened: int | None = None) -> bytes:
    """Return the bytes of a file.

    Args:
        key: what it is in the machine's spec, such as ``kernel``.
        path: where it is, or only its name where it is open already.
        opened: read from its beginning in place of ``path``; it stays open, and its position where it was.

    Raises:
        ImageError: it cannot be read, is no ordinary file, or is too large.
    """
    try:
        if opened is not None:
            return _read(key, path, opened)
        # Not waiting: a named pipe without a writer would hold up the start for ever.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            return _read(key, path, fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise ImageError(f"cannot read the {key} {path}: {error.strerror}") from error


def _read(key: str, path: Path, fd: int) -> bytes:
    about = os.fstat(fd)
    if not stat.S_ISREG(about.st_mode):
        raise ImageError(f"the {key} {path} is not a regular file")
    if about.st_size > _LIMIT:
        raise ImageError(f"the {key} {path} is larger than {format_size(_LIMIT)}, the most that kvmd loads")
    # Whoever opened it may be using its position.
    data = bytearray()
    while len(data) <= _LIMIT and (more := os.pread(fd, _READ_AT_ONCE, len(data))):
        data += more
    return bytes(data)
