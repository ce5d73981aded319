"""What a matrix of scores is worth: where known rows stand in it, how it correlates, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
DRAWS = 2000
"""Of the bootstrap."""


@dataclass(frozen=True)
class Mean:
    """A mean over queries with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.2f}, {self.high:.2f}]"


def mean(values: Array) -> Mean:
    """Of [queries]; queries are drawn with replacement, the same every time."""
    draws = np.random.default_rng(0).integers(len(values), size=(DRAWS, len(values)))
    low, high = np.quantile(values[draws].mean(1), (0.025, 0.975))
    return Mean(float(values.mean()), float(low), float(high))


def places(scores: Array, gold: Sequence[int]) -> NDArray[np.float64]:
    """[queries], the gold row's place in each ranking from 1; among equal scores, the middle one."""
    own = scores[np.arange(len(scores)), np.asarray(gold)][:, None]
    found: NDArray[np.float64] = 1 + (scores > own).sum(1) + ((scores == own).sum(1) - 1) / 2
    return found


def spearman(first: Array, second: Array) -> NDArray[np.float64]:
    """The rank correlation of each column, [columns], of two [n, columns]; 0 where a column is constant."""
    a, b = (_ranks(each) - (len(each) + 1) / 2 for each in (first, second))
    scale = np.sqrt((a**2).sum(0) * (b**2).sum(0))
    return np.divide((a * b).sum(0), scale, out=np.zeros(a.shape[1]), where=scale > 0)


def overlap(first: Array, second: Array, k: int) -> NDArray[np.float64]:
    """[queries], the share of the first k rows of one ranking that are among the first k of another."""
    tops = [np.argsort(-each, axis=1, kind="stable")[:, :k] for each in (first, second)]
    return np.array([len(set(a.tolist()) & set(b.tolist())) / k for a, b in zip(*tops, strict=True)])


def _ranks(values: Array) -> NDArray[np.float64]:
    """Along the first axis, equal values sharing the mean of theirs."""
    found = np.empty(values.shape, dtype=np.float64)
    for column in range(values.shape[1]):
        _, place, many = np.unique(values[:, column], return_inverse=True, return_counts=True)
        found[:, column] = (many.cumsum() - (many - 1) / 2)[place]
    return found
