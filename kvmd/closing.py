"""What has to be closed, as a context manager."""

from __future__ import annotations

from types import TracebackType
from typing import Self


class Closing:
    """A ``with`` block around this object ends with its ``close``."""

    __slots__ = ()

    def close(self) -> None:
        """Give up what it holds; harmless the second time."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
