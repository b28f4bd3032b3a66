"""A machine as the command line describes it, made into what the API takes.

The image is opened here, with the rights of who calls, and passed to the daemon: it opens nothing for a caller that
the caller may not read.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import click

from kvmd.ctl.client import Client
from kvmd.ctl.errors import Mistake, Refused
from kvmd.ctl.text import shown
from kvmd.options import machine_options
from kvmd.units import parse_size

BUILTIN_PREFIX = "builtin:"

_F = TypeVar("_F", bound=Callable[..., Any])


class Wanted(NamedTuple):
    """A machine to create.

    Attributes:
        document: what the API takes.
        image: the file to pass, or None for a built-in guest.
    """

    document: dict[str, object]
    image: Path | None


def machine_description(command: _F) -> _F:
    """Add the argument and the options that describe a machine: those of ``kvmd run``."""
    return click.argument("target", metavar="SPEC.toml|GUEST.elf|builtin:NAME")(machine_options(command))


def wanted(target: str, overrides: Mapping[str, object]) -> Wanted:
    """Return the machine that the command line asks for.

    Args:
        target: a TOML file, an image, or ``builtin:`` and a name.
        overrides: fields of it; None or an empty tuple where the command line said nothing.

    Raises:
        Mistake: there is no such file, or it is none of a machine.
    """
    document: dict[str, object] = _loaded(Path(target)) if target.endswith(".toml") else {"image": target}
    document.update(
        (key, list(value) if isinstance(value, tuple) else value)
        for key, value in overrides.items()
        if value not in (None, ())
    )
    key = "image" if "kernel" not in document else "kernel"
    image = document.get(key)
    if not isinstance(image, str) or not image or "\0" in image:
        raise Mistake(f"{shown(target)}: {key} is missing, or no path")
    if key == "image" and image.startswith(BUILTIN_PREFIX):
        return Wanted(document, None)
    # A file names its image as seen from where it is.
    base = Path(target).parent if target.endswith(".toml") else Path()
    _name_from_anywhere(document, base)
    return Wanted(document, base / image)


def _name_from_anywhere(document: dict[str, object], base: Path) -> None:
    """Make absolute what kvmd opens by its name: a Linux guest's initial RAM disk and disks."""
    if isinstance(initrd := document.get("initrd"), str):
        document["initrd"] = str((base / initrd).absolute())
    disks = document.get("disks")
    for disk in disks if isinstance(disks, list) else []:
        if isinstance(disk, dict) and isinstance(path := disk.get("path"), str):
            disk["path"] = str((base / path).absolute())


def create(client: Client, machine: Wanted) -> dict[str, Any]:
    """Create a machine, and return it.

    An image that cannot be opened here is asked for by its name: it may be in a folder that the daemon allows.

    Raises:
        CtlError: it was not created.
    """
    with _opened("kernel" if "kernel" in machine.document else "image", machine.image) as (files, problem):
        try:
            answer = client.post("/v1/machines", machine.document, files=files)
        except Refused as error:
            if problem is not None and error.kind == "invalid-image":
                raise Mistake(f"{problem}; kvmd says: {error}") from error
            raise
    if not isinstance(answer, dict) or not isinstance(answer.get("name"), str):
        raise Mistake("kvmd did not say what it called the machine")
    return answer


@contextmanager
def _opened(what: str, image: Path | None) -> Iterator[tuple[tuple[int, ...], str | None]]:
    """Yield the descriptors to pass, or what was in the way of opening the image, or the kernel."""
    if image is None:
        yield (), None
        return
    try:
        # O_NONBLOCK: of a FIFO that nobody writes to, open would wait for ever.
        fd = os.open(image, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        yield (), f"cannot open the {what} {shown(image)}: {error.strerror}"
        return
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise Mistake(f"the {what} {shown(image)} is not an ordinary file")
        yield (fd,), None
    finally:
        os.close(fd)


def _loaded(path: Path) -> dict[str, object]:
    """Return what a TOML file says; the daemon checks what it means."""
    import json  # noqa: PLC0415 - only for files

    from kvmd.errors import ConfigError  # noqa: PLC0415 - likewise
    from kvmd.toml_file import read_toml  # noqa: PLC0415 - likewise: it imports msgspec

    name = shown(path)
    try:
        document = read_toml(path, whose="machine")
    except ConfigError as error:
        raise Mistake(shown(error)) from error
    try:
        for key in ("memory", "balloon_target"):
            _sizes_in_bytes(document, key)
        conversion = document.get("conversion")
        if isinstance(conversion, dict):
            _sizes_in_bytes(conversion, "chunk")
        limits = document.get("limits")
        if isinstance(limits, dict):
            _sizes_in_bytes(limits, "memory")
        # Dates, and numbers that are none, have no place in JSON.
        json.dumps(document, allow_nan=False)
    except TypeError as error:
        raise Mistake(f"{name}: a date or time, which no key of a machine takes: write text in quotes") from error
    except ValueError as error:
        raise Mistake(f"{name}: {shown(error)}") from error
    return document


def _sizes_in_bytes(table: dict[str, Any], key: str) -> None:
    """Make a number of a size: the file may write it in more ways than the API takes."""
    if isinstance(table.get(key), str):
        table[key] = parse_size(table[key])
