"""Estimates with 95 % intervals over rows.

A mean's and an area's are bootstrap intervals, by a fixed seed, so that the same rows give the same ends. A share's is
Wilson's: where no row or every row succeeds, as one hopes, every bootstrap draw is the same and would claim certainty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from app.unlearning.weights import Floats

DRAWS = 1000
TAIL = 0.025
Z = 1.959964
"""The normal distribution's quantile at 1 - TAIL."""


@dataclass(frozen=True)
class Estimate:
    """A value, the ends of its interval, and of how many rows."""

    value: float
    low: float
    high: float
    rows: int


def mean(numbers: Sequence[float], of: Callable[[Floats], Floats] = np.asarray) -> Estimate | None:
    """Of the mean of some numbers, or of what a monotone function makes of it; None where there are none."""
    if not numbers:
        return None
    values = np.asarray(numbers, dtype=np.float64)
    draws = np.random.default_rng(0).integers(0, len(values), (DRAWS, len(values)))
    return _estimate(of(values.mean(keepdims=True)), of(values[draws].mean(1)), len(values))


def share(hits: Sequence[float]) -> Estimate | None:
    """Of a share, from a 1 or a 0 for each row."""
    if not hits:
        return None
    n, p = len(hits), sum(hits) / len(hits)
    middle = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    return Estimate(p, max(0.0, middle - half), min(1.0, middle + half), n)


def auc(members: Sequence[float], others: Sequence[float]) -> Estimate | None:
    """The probability that a member has a lower number than another row, ties half; rows of both are drawn anew."""
    if not members or not others:
        return None
    mine, theirs = (np.asarray(each, dtype=np.float64) for each in (members, others))
    wins = (mine[:, None] < theirs) + 0.5 * (mine[:, None] == theirs)  # [members, others]
    rng = np.random.default_rng(0)
    drawn = [
        wins[np.ix_(rng.integers(0, len(mine), len(mine)), rng.integers(0, len(theirs), len(theirs)))].mean()
        for _ in range(DRAWS)
    ]
    return _estimate(wins.mean(keepdims=True).ravel(), np.asarray(drawn), len(mine) + len(theirs))


def _estimate(value: Floats, drawn: Floats, rows: int) -> Estimate:
    low, high = np.quantile(drawn, [TAIL, 1 - TAIL])
    return Estimate(float(value[0]), float(low), float(high), rows)
