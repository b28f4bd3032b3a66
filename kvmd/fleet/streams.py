"""Streams that are plain objects: whoever stops in the middle of one leaves nothing to be finished.

An async generator would have to be closed by whoever iterates, and who forgets that leaves it to the garbage collector.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Generic, Self, TypeVar

T = TypeVar("T")


class Stream(Generic[T]):
    """Iterates over what a function returns, until it returns None.

    Args:
        following: returns the next item, waiting for it.
    """

    def __init__(self, following: Callable[[], Awaitable[T | None]]) -> None:
        self._following = following

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        item = await self._following()
        if item is None:
            raise StopAsyncIteration
        return item
