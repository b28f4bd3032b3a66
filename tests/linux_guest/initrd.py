"""The initial RAM disk of Linux guests in tests: a cpio archive with our init and the modules that it loads."""

from __future__ import annotations

import lzma
import re
import stat
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

INIT = Path(__file__).with_name("init")

_CONSOLE = (5, 1)  # Documentation/admin-guide/devices.txt
_ALIGNMENT = 4


@dataclass(frozen=True)
class Member:
    """A member of an archive, as Documentation/driver-api/early-userspace/buffer-format.rst has them."""

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def cpio(members: Sequence[Member]) -> bytes:
    """Return an archive in the format "newc"; equal members make equal bytes."""
    parts = []
    for number, member in enumerate([*members, Member("TRAILER!!!", 0)], start=1):
        name = member.name.encode() + b"\0"
        fields = (
            *(number, member.mode, 0, 0, 1, 0, len(member.data)),
            *(0, 0, *member.device, len(name), 0),
        )
        parts.append(_padded(b"070701" + b"".join(b"%08X" % field for field in fields) + name))
        parts.append(_padded(member.data))
    return b"".join(parts)


def initrd(modules: Sequence[Path] = ()) -> bytes:
    """Return an initial RAM disk whose /init is ``init.c``.

    Args:
        modules: files of the kernel's, in the order in which they are to be loaded.
    """
    files = [Member(f"lib/{path.name.split('.ko')[0]}.ko", stat.S_IFREG | 0o644, unpacked(path)) for path in modules]
    return cpio(
        [
            *(Member(folder, stat.S_IFDIR | 0o755) for folder in ("dev", "proc", "sys", "disk", "lib")),
            # Init's standard input and output, from before it can mount anything.
            Member("dev/console", stat.S_IFCHR | 0o600, device=_CONSOLE),
            Member("init", stat.S_IFREG | 0o755, INIT.read_bytes()),
            *files,
            Member("modules", stat.S_IFREG | 0o644, "".join(f"/{file.name}\n" for file in files).encode()),
        ]
    )


def unpacked(module: Path) -> bytes:
    """Return a module as the kernel loads it: distributions pack theirs in several ways."""
    data = module.read_bytes()
    match module.suffix:
        case ".xz":
            return lzma.decompress(data)
        case ".gz":
            return zlib.decompress(data, wbits=31)
        case _:
            return data


def with_dependencies(names: Sequence[str], folder: Path) -> list[Path]:
    """Return the files of modules and of those that they need, each after what it needs.

    Args:
        names: of modules; one that has no file is in the kernel already, or nothing would work.
        folder: of all modules of the kernel.
    """
    files = {path.name.split(".ko")[0].replace("-", "_"): path for path in folder.rglob("*.ko*")}
    found: list[Path] = []

    def add(name: str) -> None:
        path = files.get(name.replace("-", "_"))
        if path is None or path in found:
            return
        for needed in _dependencies(unpacked(path)):
            add(needed)
        found.append(path)

    for name in names:
        add(name)
    return found


def members_of(archive: bytes) -> Iterator[Member]:
    """Yield the members of an archive, as a kernel would read it."""
    at = 0
    while True:
        magic, fields = archive[at : at + 6], archive[at + 6 : at + 110]
        assert magic == b"070701"
        (_, mode, _, _, _, _, size, _, _, major, minor, name_size, _) = (
            int(field, 16) for field in struct.unpack("8s" * 13, fields)
        )
        name = archive[at + 110 : at + 110 + name_size - 1].decode()
        start = _aligned(at + 110 + name_size)
        if name == "TRAILER!!!":
            return
        yield Member(name, mode, archive[start : start + size], (major, minor))
        at = _aligned(start + size)


def _dependencies(module: bytes) -> list[str]:
    found = re.search(rb"\0depends=([^\0]*)\0", module)
    return [name for name in found[1].decode().split(",") if name] if found else []


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _padded(data: bytes) -> bytes:
    return data.ljust(_aligned(len(data)), b"\0")
