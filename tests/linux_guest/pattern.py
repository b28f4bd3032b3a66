"""What files between host and guest are made of: pieces of 64 KiB that differ, made as init.c makes them."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import cache

PIECE = 65536

_SEED = 88172645463325252
_U64 = (1 << 64) - 1


@cache
def _first() -> bytes:
    # Marsaglia's xorshift64, "Xorshift RNGs", 2003.
    state, values = _SEED, []
    for _ in range(PIECE // 8):
        state ^= state << 13 & _U64
        state ^= state >> 7
        state ^= state << 17 & _U64
        values.append(state)
    return struct.pack(f"<{len(values)}Q", *values)


def pieces(size: int) -> Iterator[bytes]:
    """Yield a file of ``size`` bytes, piece by piece: each starts with its number, and is random after that."""
    rest = _first()[8:]
    for done in range(0, size, PIECE):
        yield (struct.pack("<Q", done // PIECE) + rest)[: size - done]
