"""Listening on a Unix socket that nobody else listens on."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import trio

from kvmd.errors import ConfigError, HostError

MODE = 0o660
"""Who may connect: the socket's owner and its group (unix(7): connecting needs the permission to write)."""

_PATH_LIMIT = 107
"""Bytes of a socket's path (unix(7): sun_path has 108 with its zero)."""

_BACKLOG = 1024
_HELD_BY_OTHERS = {errno.EACCES, errno.EAGAIN}


@contextmanager
def listening(path: Path, *, group: int | None = None) -> Iterator[trio.socket.SocketType]:
    """Yield a listening socket at ``path``, with mode ``MODE`` and its group; the file goes away at the end.

    A file that a daemon left behind is taken over, but only where nobody listens on it. Two daemons that start at
    once are kept apart by a lock on ``path`` with ``.lock`` after it, which stays: to remove it would let a third
    one lock a file that the second no longer sees.

    Args:
        path: where.
        group: who may connect beside the owner; by default this process's group.

    Raises:
        ConfigError: somebody listens there, or the path is no place for a socket.
        HostError: this process may not make a socket there.
    """
    if len(os.fsencode(path)) > _PATH_LIMIT:
        raise ConfigError(f"the socket's path {path} is too long: Linux allows {_PATH_LIMIT} bytes")
    with _locked(path), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as listener:
        _remove_stale(path)
        # Linux gives the file the mode of the socket (net/unix/af_unix.c, unix_bind_bsd): until the group is right,
        # nobody else may connect.
        os.fchmod(listener.fileno(), 0o600)
        try:
            listener.bind(os.fsencode(path))
        except OSError as error:
            raise HostError(f"cannot make the socket {path}: {error.strerror}") from error
        made = path.lstat()
        try:
            try:
                if group is not None:
                    give(path, group)
                path.chmod(MODE)
            except OSError as error:
                raise HostError(f"cannot open the socket {path} to its group: {error.strerror}") from error
            listener.listen(_BACKLOG)
            yield trio.socket.from_stdlib_socket(listener)
        finally:
            with suppress(OSError):
                found = path.lstat()
                if (found.st_dev, found.st_ino) == (made.st_dev, made.st_ino):
                    path.unlink()


def give(path: Path, group: int | None) -> None:
    """Give a socket to another group; None stands for this process's.

    Raises:
        HostError: this process may not.
    """
    try:
        os.chown(path, -1, os.getegid() if group is None else group, follow_symlinks=False)
    except OSError as error:
        raise HostError(f"cannot give the socket {path} to group {group}: {error.strerror}") from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = path.with_name(path.name + ".lock")
    try:
        fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise HostError(f"cannot open {lock}, which keeps two daemons apart: {error.strerror}") from error
    try:
        try:
            os.lockf(fd, os.F_TLOCK, 0)
        except OSError as error:
            if error.errno not in _HELD_BY_OTHERS:
                raise HostError(f"cannot lock {lock}: {error.strerror}") from error
            raise ConfigError(
                f"another kvmd listens on {path}: stop it, or give this one a socket of its own"
            ) from error
        yield
    finally:
        os.close(fd)


def _remove_stale(path: Path) -> None:
    """Remove a socket that nobody listens on.

    Raises:
        ConfigError: somebody does, or it is no socket.
        HostError: it cannot be removed.
    """
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise HostError(f"cannot look at {path}: {error.strerror}") from error
    if not stat.S_ISSOCK(found.st_mode):
        raise ConfigError(f"{path} is there and is no socket: remove it, or name another path for the socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        # Only a refusal says that nobody listens: a full backlog, say, is EAGAIN.
        if probe.connect_ex(os.fsencode(path)) != errno.ECONNREFUSED:
            raise ConfigError(f"somebody listens on {path}: stop them, or give kvmd a socket of its own")
    try:
        path.unlink()
    except OSError as error:
        raise HostError(f"cannot remove the stale socket {path}: {error.strerror}") from error
