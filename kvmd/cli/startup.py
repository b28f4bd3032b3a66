"""What ``kvmd`` does before anything else: what makes it start quickly, and safely."""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from collections.abc import Callable
from typing import Any, cast


def import_structlog_without_rich() -> None:
    """Import structlog, and keep it from importing rich.

    Where rich is installed, structlog imports its tracebacks, syntax highlighter and all, 120 ms of the half
    second that a start may take, for coloured tracebacks that kvmd does not use. An entry of None in
    ``sys.modules`` makes an import fail (Python's import system, 5.3.1), which structlog is prepared for. rich can
    be imported as always afterwards. Does nothing where one of the two was imported already.
    """
    if "rich" in sys.modules or "structlog" in sys.modules:
        return
    modules = cast("dict[str, Any]", sys.modules)
    modules["rich"] = None
    try:
        import structlog  # noqa: F401, PLC0415 - for the side effect, at this moment
    finally:
        del modules["rich"]


def _asyncio() -> types.ModuleType:
    import asyncio  # noqa: PLC0415 - where it is used

    return asyncio


def _ssl() -> types.ModuleType:
    import ssl  # noqa: PLC0415 - where it is used

    return ssl


class _Stand(types.ModuleType):
    """Stands in for a module until something of it is asked for.

    importlib.util.LazyLoader does not do: the second ``import`` of its module imports that for good.

    Args:
        name: the module's.
        load: imports it.
    """

    def __init__(self, name: str, load: Callable[[], types.ModuleType]) -> None:
        super().__init__(name)
        self.__spec__ = importlib.util.find_spec(name)
        self._load = load

    def __getattr__(self, attribute: str) -> object:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(self._load(), attribute)


def import_lazily() -> None:
    """Have asyncio and ssl imported when something of them is used, instead of where they are named.

    structlog names the one and trio the other, for what kvmd does not do: together 2 MiB of memory that no process of a
    machine shares with another, and a tenth of the time that it takes to start. Does nothing for a module that was
    imported already.
    """
    for name, load in (("asyncio", _asyncio), ("ssl", _ssl)):
        if name not in sys.modules:
            sys.modules[name] = _Stand(name, load)


def open_standard_files() -> None:
    """Open /dev/null in place of standard files that kvmd was started without (``>&-``).

    Otherwise the next file that is opened gets such a number, and what is meant for the log goes into a guest's
    descriptor.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123 - open as long as we run
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123 - open as long as we run
