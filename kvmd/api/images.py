"""Opening guest images with no more rights than the caller has.

The daemon may read files that an operator may not. So an API call names a guest that kvmd brings along, a file in one
of the folders that the administrator allows, or brings the file itself: a descriptor that the client opened with its
own rights, passed over the socket (SCM_RIGHTS) with the request.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from kvmd.api.problems import Problem, ProblemType
from kvmd.errors import ConfigError, ImageError
from kvmd.spec.machine import BUILTIN_PREFIX, MachineSpec

_SYS_OPENAT2 = 437
"""The same on every architecture (Linux 5.6)."""

_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_BENEATH = 0x08
_OPEN_HOW = struct.Struct("QQQ")
"""struct open_how: flags, mode, resolve (openat2(2))."""

_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def opened_files(
    spec: MachineSpec, image_folders: Sequence[Path], disk_folders: Sequence[Path], *, passed: int | None = None
) -> Iterator[Sequence[int]]:
    """Yield an open descriptor of each file that a machine's spec names, in the order of ``spec.files``.

    Kernels and initial RAM disks are looked for as images are, disks in folders of their own: guests write to those.

    Args:
        spec: of the machine.
        image_folders: allowed ones, as for ``opened_image``.
        disk_folders: likewise, for disks.
        passed: what the client passed in place of the first file.

    Raises:
        ImageError: one is in none of its folders, or is no file that can be read.
    """
    with ExitStack() as stack:
        fds: list[int] = []
        for index, (key, path) in enumerate(spec.files):
            if index == 0 and passed is not None:
                fds.append(passed)
                continue
            is_disk = key.startswith("disks")
            fd = _open_in_folders(str(path), disk_folders if is_disk else image_folders, "disk" if is_disk else key)
            stack.callback(os.close, fd)
            fds.append(fd)
        yield fds


def check_networks(spec: MachineSpec, bridges: Sequence[str], *, namespaces: bool) -> None:
    """Refuse networks that the administrator does not allow.

    Raises:
        ConfigError: there is one; the message says what would be right.
    """
    for index, network in enumerate(spec.networks):
        if network.kind == "namespace":
            if not namespaces:
                raise ConfigError(
                    f"networks[{index}]: no network namespaces are allowed here: have networks.namespaces set in "
                    "kvmd.toml"
                )
        elif network.bridge not in bridges:
            raise ConfigError(
                f"networks[{index}].bridge: {network.bridge} is not one of the allowed bridges "
                f"({', '.join(bridges) or 'none'}): have it allowed in kvmd.toml"
            )


@contextmanager
def opened_image(image: str, folders: Sequence[Path]) -> Iterator[int | None]:
    """Yield an open descriptor of the image that a client names, or None for a built-in guest.

    Symbolic links are followed as long as they stay in their folder (openat2, RESOLVE_BENEATH): whatever is renamed or
    linked meanwhile, nothing outside of it is opened.

    Args:
        image: an absolute path, or one that is relative to any of the folders.
        folders: allowed ones; the first that has the image is taken.

    Raises:
        ImageError: it is in none of them, or it is no file that can be read.
    """
    if image.startswith(BUILTIN_PREFIX):
        yield None
        return
    fd = _open_in_folders(image, folders)
    try:
        yield fd
    finally:
        os.close(fd)


def check_passed(fd: int, image: str) -> str:
    """Return the name of an image that a client passed.

    Raises:
        ImageError: it is not an ordinary file: what would read it might wait for ever.
        Problem: ``invalid-request``: it names a built-in guest as well.
    """
    if image.startswith(BUILTIN_PREFIX):
        raise Problem(
            ProblemType.INVALID_REQUEST, f"body.image: {image!r} needs no file, but one came with the request"
        )
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise ImageError("what was passed with the request is not an ordinary file")
    name = image.rstrip("/").rpartition("/")[2]
    return name if name not in {"", ".", ".."} else "passed"


def _open_in_folders(image: str, folders: Sequence[Path], what: str = "image") -> int:
    shown = image if image.isprintable() else repr(image)
    if "\0" in image:
        raise ImageError(f"{what}: {shown} is no path")
    path = Path(image)
    problem = errno.ENOENT
    for folder in folders:
        if not path.is_absolute():
            inside = path
        elif path.is_relative_to(folder):
            inside = path.relative_to(folder)
        else:
            continue
        try:
            return _open_beneath(folder, inside)
        except OSError as error:
            problem = error.errno or errno.EIO
            if problem != errno.ENOENT:
                break
    where = ", ".join(str(folder) for folder in folders) or "none"
    mend = "have the folder allowed in kvmd.toml"
    match problem:
        case errno.EINVAL:
            raise ImageError(f"the {what} {shown} in an allowed folder ({where}) is not an ordinary file: name one")
        case errno.EXDEV:
            why = "it leads out of them"
        case errno.EACCES | errno.EPERM:
            why, mend = os.strerror(problem), "let kvmd's user read it"
        case _:
            why = os.strerror(problem)
    pass_it = "" if what in {"initrd", "disk"} else "pass the file itself, or "
    raise ImageError(f"cannot open the {what} {shown} in an allowed folder ({where}): {why}; {pass_it}{mend}")


def _open_beneath(folder: Path, inside: Path) -> int:
    """Open an ordinary file for reading; nothing else is ever opened, since opening a device may do something."""
    top = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        found = _openat2(top, inside, os.O_PATH | os.O_CLOEXEC)
    finally:
        os.close(top)
    try:
        if not stat.S_ISREG(os.fstat(found).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY)
    finally:
        os.close(found)


def _openat2(top: int, inside: Path, flags: int) -> int:
    how = _OPEN_HOW.pack(flags, 0, _RESOLVE_BENEATH | _RESOLVE_NO_MAGICLINKS)
    fd: int = _libc.syscall(_SYS_OPENAT2, top, os.fsencode(inside), how, len(how))
    if fd < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return fd
