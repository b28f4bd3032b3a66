"""Streams that are plain objects: whoever stops in the middle of one leaves nothing to be finished.

An async generator would have to be closed by whoever iterates, and who forgets that leaves it to the garbage collector.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Generic, Self, TypeVar

from kvmd.fleet.base import Event

AGAIN_SECONDS = 1.0
"""Before a machine that has no room for one more reader, or is about to end, is tried again."""

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


class PlacedStream(Stream[Event]):
    """Events, and where their reader is: ``kvmd.fleet.base.EventStream``.

    Args:
        following: returns the next event, waiting for it.
        place: returns the id of the reader's place.
    """

    def __init__(self, following: Callable[[], Awaitable[Event | None]], place: Callable[[], str | None]) -> None:
        super().__init__(following)
        self._place = place

    @property
    def place(self) -> str | None:
        """The id before the first event that is still to come; None where that is not known yet."""
        return self._place()
