"""How evenly something is shared out."""

from __future__ import annotations

from collections.abc import Sequence


def jain(shares: Sequence[float]) -> float:
    """Return Jain's index of the shares: 1 where all are the same, 1 / n where one of n has everything.

    The source is R. Jain, D. Chiu, W. Hawe, "A quantitative measure of fairness" (DEC TR-301, 1984).
    """
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else 1.0


def least_of_most(shares: Sequence[float]) -> float:
    """Return the smallest share as a part of the largest: 1 where all are the same."""
    most = max(shares)
    return min(shares) / most if most else 1.0
