"""Debian's stock cloud kernel, from its package: fetched once into a cache, never committed.

``python -m tests.linux_guest.debian`` fetches it, with apt, and prints where it is.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(os.environ.get("KVMD_KERNEL_CACHE") or Path(__file__).parents[2] / "build" / "kernels")
"""By default in the repository, beside the lab's kernel: the lab sees it there."""

_META_PACKAGE = "linux-image-cloud-amd64"
_MODULES = ("virtio_mmio", "virtio_blk", "virtio_net", "virtio_rng", "virtio_balloon")


@dataclass(frozen=True)
class Kernel:
    """A kernel and what its guest needs to load.

    Attributes:
        image: a bzImage, or an ELF file.
        modules: the folder of its modules, or None where all is built in.
        wanted: modules that make virtio devices work.
    """

    image: Path
    modules: Path | None = None
    wanted: tuple[str, ...] = ()


def find() -> Kernel | None:
    """Return the newest one in the cache, or None; nothing is fetched."""
    images = sorted(CACHE.glob("*/boot/vmlinuz-*"), key=lambda path: path.stat().st_mtime)
    if not images:
        return None
    modules = next((images[-1].parents[1] / "lib" / "modules").iterdir())
    return Kernel(images[-1], modules, _MODULES)


def fetch() -> Kernel:
    """Return the one that Debian has now, fetched where the cache has none.

    Apt's lists are brought up to date, for which it takes root, only where they know no such package, or one that the
    mirror has no longer.

    Raises:
        subprocess.CalledProcessError: apt or dpkg-deb failed.
        LookupError: this host's apt knows no such package.
    """
    found = find()
    if found is not None:
        return found
    CACHE.mkdir(parents=True, exist_ok=True)
    try:
        _fetch_newest()
    except (LookupError, subprocess.CalledProcessError):
        _run("apt-get", "update", "-qq", cwd=Path())
        _fetch_newest()
    found = find()
    assert found is not None
    return found


def _fetch_newest() -> None:
    known = _run("apt-cache", "depends", _META_PACKAGE, cwd=Path())
    package = re.search(r"Depends: (linux-image-\S+-cloud-amd64)", known)
    if package is None:
        raise LookupError(f"apt knows no package {_META_PACKAGE}: is this Debian?")
    with tempfile.TemporaryDirectory(dir=CACHE) as text:
        folder = Path(text)
        _run("apt-get", "download", package[1], cwd=folder)
        (archive,) = folder.glob("*.deb")
        _run("dpkg-deb", "--extract", str(archive), "unpacked", cwd=folder)
        # Renamed when it is whole: an interrupted one is never found.
        (folder / "unpacked").rename(CACHE / archive.name.removesuffix(".deb"))


def _run(name: str, *arguments: str, cwd: Path) -> str:
    program = shutil.which(name)
    if program is None:
        raise LookupError(f"there is no {name}: this is not Debian")
    return subprocess.run([program, *arguments], cwd=cwd, capture_output=True, text=True, check=True).stdout  # noqa: S603 - apt's


if __name__ == "__main__":
    try:
        print(fetch().image)  # noqa: T201 - a program
    except (LookupError, subprocess.CalledProcessError) as error:
        sys.exit(str(getattr(error, "stderr", None) or error))
