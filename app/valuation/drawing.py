"""Which rows are labelled: at random, spread over clusters of the features, or where the student is unsure."""

from __future__ import annotations

from typing import Literal

import faiss
import numpy as np
from numpy.typing import NDArray

Draw = Literal["random", "spread"]
Places = NDArray[np.int64]
CLUSTERS = 64
"""At most; fewer where fewer rows are drawn."""


def at_random(rows: int, seed: int) -> Places:
    """All rows in a random order: a longer draw holds every shorter one."""
    return np.random.default_rng(seed).permutation(rows)


def spread(features: NDArray[np.float32], many: int, seed: int) -> Places:
    """All rows, ordered so that any beginning takes from every cluster in turn, at random within it.

    Args:
        features: [rows, width]; rows are compared by direction.
        many: how many are likely to be drawn, from which follows the number of clusters.
    """
    clusters = max(1, min(CLUSTERS, many // 4, len(features) // 2))
    unit = features - features.mean(0)
    unit = np.ascontiguousarray(unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12))
    means = faiss.Kmeans(unit.shape[1], clusters, niter=20, seed=seed, min_points_per_centroid=1)
    means.train(unit)
    _, nearest = means.index.search(unit, 1)
    order = at_random(len(unit), seed)
    turn = np.zeros(len(unit), dtype=np.int64)  # how many of its cluster come before a row
    taken = np.zeros(clusters, dtype=np.int64)
    for row in order:
        turn[row] = taken[nearest[row, 0]]
        taken[nearest[row, 0]] += 1
    return order[np.argsort(turn[order], kind="stable")]


def unsure(uncertainty: NDArray[np.float64], labelled: NDArray[np.bool_], many: int) -> Places:
    """The unlabelled rows of the largest uncertainty; of equals the earlier."""
    order = np.argsort(-np.where(labelled, -np.inf, uncertainty), kind="stable")
    return order[: min(many, int((~labelled).sum()))]
