"""Agreement of two orders."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray


def spearman(one: ArrayLike, other: ArrayLike) -> float:
    """Spearman's rank correlation; equal numbers share the mean of their ranks. 0 where either side is constant."""
    a, b = (_ranks(np.asarray(side, dtype=np.float64)) for side in (one, other))
    a, b = a - a.mean(), b - b.mean()
    size = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / size if size else 0.0


def interval(correlation: float, rows: int) -> tuple[float, float]:
    """95 % bounds of a rank correlation over so many rows (Fisher's z with the factor 1.06 of Fieller et al., 1957)."""
    if rows < 4:
        return -1.0, 1.0
    middle = math.atanh(max(-0.999999, min(0.999999, correlation)))
    half = 1.96 * math.sqrt(1.06 / (rows - 3))
    return math.tanh(middle - half), math.tanh(middle + half)


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, place, many = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(many)
    ranks: NDArray[np.float64] = (last - (many - 1) / 2)[place]
    return ranks
