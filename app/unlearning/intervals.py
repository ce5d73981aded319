"""Means and areas under curves, each with a bootstrap interval over rows: seeded, so the same rows give the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from app.unlearning.weights import Floats

DRAWS = 1000
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A value, the ends of its interval, and of how many rows."""

    value: float
    low: float
    high: float
    rows: int


def mean(numbers: Sequence[float], of: Callable[[Floats], Floats] = lambda means: means) -> Estimate | None:
    """Of the mean of some numbers, or of what `of` makes of the mean; None where there are none."""
    if not numbers:
        return None
    values = np.asarray(numbers, dtype=np.float64)
    draws = np.random.default_rng(0).integers(0, len(values), (DRAWS, len(values)))
    return _estimate(of(values.mean(keepdims=True)), of(values[draws].mean(1)), len(values))


def auc(members: Sequence[float], others: Sequence[float]) -> Estimate | None:
    """The probability that a member has a lower number than another row (ties half); rows of both are drawn anew."""
    if not members or not others:
        return None
    mine, theirs = (np.asarray(each, dtype=np.float64) for each in (members, others))
    wins = (mine[:, None] < theirs) + 0.5 * (mine[:, None] == theirs)  # [members, others]
    rng = np.random.default_rng(0)
    drawn = np.array(
        [
            wins[np.ix_(rng.integers(0, len(mine), len(mine)), rng.integers(0, len(theirs), len(theirs)))].mean()
            for _ in range(DRAWS)
        ]
    )
    return _estimate(wins.mean(keepdims=True).ravel(), drawn, len(mine) + len(theirs))


def _estimate(value: Floats, drawn: Floats, rows: int) -> Estimate:
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(value[0]), float(low), float(high), rows)
