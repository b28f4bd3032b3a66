"""What makes ``kvmd`` start quickly."""

from __future__ import annotations

import sys
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
