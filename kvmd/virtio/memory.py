"""What devices need of guest memory; ``kvmd.memory.accessor.HostAccessor`` has it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

Segments = Sequence[tuple[int, int]]
"""Pieces of guest memory, each as (gpa, bytes): what a chain of descriptors says, not yet looked at."""

PART_BYTES = 1 << 10
"""What a part of a buffer costs whoever has others wait for its turn, beside its bytes: some microseconds where pages
may be private, so as much as that many bytes, and a buffer may have 511 parts of a byte each."""


class GuestMemory(Protocol):
    """Shared guest memory, without a copy."""

    @property
    def converts(self) -> bool:
        """Whether pages may turn private; then a view is valid only within ``hold``."""

    def hold(self) -> AbstractContextManager[object]:
        """Return what keeps pages as they are while it is entered. Nothing may block within it."""

    def view(self, gpa: int, size_bytes: int, /) -> memoryview:
        """Return the bytes themselves, writable. Raises ``kvmd.memory.accessor.Inaccessible``."""

    @property
    def tracks_writes(self) -> bool:
        """Whether ``wrote`` has to be called for what is written through views."""

    def wrote(self, gpa: int, size_bytes: int, /) -> None:
        """Tell that these bytes were written through a view."""


def views(memory: GuestMemory, segments: Segments) -> list[memoryview]:
    """Return the bytes of all segments. To be called within ``hold``.

    Raises:
        Inaccessible: one of them is private, or not within memory.
    """
    view = memory.view
    return [view(gpa, size_bytes) for gpa, size_bytes in segments]


def gather(memory: GuestMemory, segments: Segments) -> bytes:
    """Copy the bytes of all segments out. To be called within ``hold``. Raises as ``views``."""
    if len(segments) == 1:
        return bytes(memory.view(*segments[0]))
    return b"".join(views(memory, segments))


def scatter(memory: GuestMemory, segments: Segments, data: bytes | bytearray | memoryview) -> int:
    """Copy ``data`` into the segments, as much as fits, and return how much did.

    To be called within ``hold``. Raises as ``views``.
    """
    done = 0
    with memoryview(data) as source:
        for gpa, size_bytes in segments:
            piece = source[done : done + size_bytes]
            if not piece:
                break
            memory.view(gpa, len(piece))[:] = piece
            done += len(piece)
    return done


def total_bytes(segments: Segments) -> int:
    """Return how many bytes the segments are."""
    return sum([size_bytes for _, size_bytes in segments])  # a list: faster than a generator for some segments


def split(segments: Segments, at: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Return the first ``at`` bytes of the segments, and the rest; both may be empty."""
    head: list[tuple[int, int]] = []
    for index, (gpa, size_bytes) in enumerate(segments):
        if at < size_bytes:
            if at > 0:
                head.append((gpa, at))
            return head, [(gpa + at, size_bytes - at) if at > 0 else (gpa, size_bytes), *segments[index + 1 :]]
        head.append((gpa, size_bytes))
        at -= size_bytes
    return head, []
