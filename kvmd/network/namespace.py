"""Network namespaces with a name in /run/netns, as ``ip netns`` has them (ip-netns(8))."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from pathlib import Path

from kvmd.errors import HostError
from kvmd.network.naming import NAMESPACE_PREFIX

FOLDER = Path("/run/netns")

_CLONE_NEWNET = 0x40000000
_MS_BIND, _MS_REC, _MS_SHARED = 0x1000, 0x4000, 0x100000
_MNT_DETACH = 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)
_libc.unshare.argtypes = (ctypes.c_int,)
_libc.setns.argtypes = (ctypes.c_int, ctypes.c_int)


def become_new() -> None:
    """Take the calling thread, which must end with this work, into a new network namespace without a name.

    Raises:
        HostError: it may not.
    """
    _check(_libc.unshare(_CLONE_NEWNET), "make a network namespace")


def enter(name: str) -> None:
    """Take the calling thread, which must end with this work, into the namespace of that name.

    Raises:
        HostError: there is none, or it may not.
    """
    try:
        fd = os.open(FOLDER / name, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(f"cannot open network namespace {name}: {error.strerror}") from error
    try:
        _check(_libc.setns(fd, _CLONE_NEWNET), f"enter network namespace {name}")
    finally:
        os.close(fd)


def is_there(name: str) -> bool:
    """Whether there is a namespace of that name; a file left by a death between two steps is none."""
    return (FOLDER / name).exists() and _is_mount(FOLDER / name)


def ours_perhaps() -> list[str]:
    """Return the names of namespaces that kvmd could have made; what is in one tells."""
    try:
        found = sorted(os.listdir(FOLDER))  # noqa: PTH208 - names are all that is wanted
    except OSError:
        return []
    return [name for name in found if name.startswith(NAMESPACE_PREFIX) and is_there(name)]


def give_name(name: str) -> None:
    """Keep the calling thread's network namespace under a name, beyond the end of its processes.

    Raises:
        HostError: it may not.
    """
    own = f"/proc/self/task/{threading.get_native_id()}/ns/net"
    try:
        FOLDER.mkdir(mode=0o755, parents=True, exist_ok=True)
        _share_folder()
        (FOLDER / name).touch(mode=0o444)
    except OSError as error:
        raise HostError(f"cannot make {FOLDER / name}: {error.strerror}") from error
    _check(_mount(own, FOLDER / name, _MS_BIND), f"name network namespace {name}")


def remove(name: str) -> None:
    """Remove the name, and with it the namespace once no process is in it; harmless where there is none.

    Raises:
        HostError: it may not.
    """
    path = FOLDER / name
    if _libc.umount2(os.fsencode(path), _MNT_DETACH) and ctypes.get_errno() not in {errno.EINVAL, errno.ENOENT}:
        _fail(f"remove network namespace {name}")
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise HostError(f"cannot remove {path}: {error.strerror}") from error


def _share_folder() -> None:
    """Let names made in one mount namespace be seen, and unmounted, in others: what `ip netns add` does."""
    if _mount("", FOLDER, _MS_SHARED | _MS_REC) == 0:
        return
    if ctypes.get_errno() == errno.EINVAL and _mount(str(FOLDER), FOLDER, _MS_BIND | _MS_REC) == 0:
        _check(_mount("", FOLDER, _MS_SHARED | _MS_REC), f"share {FOLDER}")
        return
    _fail(f"share {FOLDER}")


def _is_mount(path: Path) -> bool:
    # ismount(3) compares devices, which for a file that is a mount differ from its folder's too.
    try:
        return path.stat().st_dev != path.parent.stat().st_dev
    except OSError:
        return False


def _mount(source: str, target: Path, flags: int) -> int:
    return int(_libc.mount(os.fsencode(source), os.fsencode(target), b"none", flags, None))


def _check(result: int, operation: str) -> None:
    if result != 0:
        _fail(operation)


def _fail(operation: str) -> None:
    number = ctypes.get_errno()
    if number == errno.EPERM:
        raise HostError(f"cannot {operation}: no CAP_SYS_ADMIN: docs/network.md says how to give it")
    raise HostError(f"cannot {operation}: {os.strerror(number)}")
